"""Several processes that share the samples of one analysis: rank zero leads, the others add their part."""

import atexit
import pickle
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from moe_heads.analysis._shared.interrupts import HeldInterrupts
from moe_heads.analysis._shared.progress import TimeUp

__all__ = ["RankError", "Ranks"]

T = TypeVar("T")

_STOP, _GO = 0.0, 1.0

# What ends the work of all ranks in the same way, so that none goes on where another stops.
_RAISED_ON_ALL: tuple[type[BaseException], ...] = (KeyboardInterrupt, TimeUp)

# Well below the half hour after which torch's collectives give up, well above a Hessian-vector product.
_SECONDS_BEFORE_WARNING = 60.0

# Far above the time in which a thread of gloo drops a tensor, far below what anybody notices at the end of a program.
_SECONDS_FOR_GLOO_AT_EXIT = 0.1


@cache
def _outlive_gloo() -> None:
    """Let gloo's threads drop the tensors of the last collective before the interpreter ends.

    A thread that drops one while the interpreter is being torn down aborts the process (pytorch/pytorch#190489):
    without ``destroy_process_group``, 6 of 20 runs of two ranks that ended right after a collective did; with the wait,
    none.
    """
    atexit.register(time.sleep, _SECONDS_FOR_GLOO_AT_EXIT)


class RankError(RuntimeError):
    """Another rank failed in work that all of them share."""


class Ranks:
    """The processes that work on an analysis: this one alone, or all of a process group.

    Rank zero runs the algorithm and decides; the others evaluate what it asks for on their samples. So no rounding
    error, clock or Ctrl-C on one of them can part their ways: between two ranks there are only votes, in which each
    says whether it failed or was interrupted. Each wait is watched: after a minute it is said who waits for what.

    Args:
        group: The process group, or None for this process alone.
        name: What is being done, for messages.

    Attributes:
        name: What is being done.
        rank: Number of this process, from 0.
        size: Number of processes.
        device: Where tensors have to be that travel between them.
        interrupts: Ctrl-C of this process, held back until the next vote while several processes work together.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, name: str = "analysis") -> None:
        self._group, self.name = group, name
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        backend = None if group is None else dist.get_backend(group)
        if backend == "gloo":
            _outlive_gloo()
        # NCCL moves nothing but GPU memory
        on_gpu = backend == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self.interrupts = HeldInterrupts()

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is rank zero, which decides, shows and writes."""
        return self.rank == 0

    @contextmanager
    def working(self) -> Iterator[None]:
        """Everything inside belongs together: Ctrl-C waits for the next vote. Nothing changes for a process alone."""
        if self.size == 1:
            yield
            return
        with self.interrupts:
            yield

    def run_with_sums(
        self,
        evaluate: Callable[[Tensor], Tensor],
        algorithm: Callable[[Callable[[Tensor], Tensor]], T],
        argument: Tensor,
        value: Tensor,
    ) -> T:
        """Run ``algorithm(total)`` on rank zero, where ``total(x)`` is the sum of ``evaluate(x)`` over all ranks.

        A call of ``total`` is one broadcast and one all-reduce.

        Args:
            evaluate: This rank's part of the sum.
            algorithm: Run on rank zero alone.
            argument: A tensor of the shape, data type and device of each x, 1-D.
            value: The same for ``evaluate(x)``.

        Returns:
            What ``algorithm`` returned, on every rank.

        Raises:
            RankError: If another rank failed. An error of this rank is raised as it is; Ctrl-C and the end of the time
                are raised on all of them.
        """
        if self.size == 1:
            return algorithm(evaluate)
        with self.working():
            result, error, told = None, None, None
            try:
                if self.is_rank_zero:
                    result = algorithm(lambda x: self._asked(evaluate, x, argument, value))
                else:
                    told = self._follow(evaluate, argument, value)
            except BaseException as raised:
                error = raised
            if self.is_rank_zero:
                self._send(None, argument)
            try:
                self._vote(error)
            except RankError as failure:
                raise told or failure from None
            return cast(T, self.broadcast(result))

    def run_on_rank_zero(self, function: Callable[[], T]) -> T:
        """What rank zero's ``function()`` returns, on every rank; the others wait and do nothing."""
        nothing = torch.empty(0, device=self.device)
        return self.run_with_sums(lambda x: x, lambda total: function(), nothing, nothing)

    @contextmanager
    def synchronized(self) -> Iterator[None]:
        """A block that every rank runs; an error in one of them is raised in all at its end.

        Raises:
            RankError: If another rank failed.
        """
        if self.size == 1:
            yield
            return
        with self.working():
            error = None
            try:
                yield
            except BaseException as raised:
                error = raised
            self._vote(error)

    def broadcast(self, value: T) -> T:
        """Rank zero's value, anything that can be pickled, on every rank."""
        if self.size == 1:
            return value
        with self.working():
            with self.synchronized():
                pickled = pickle.dumps(value) if self.is_rank_zero else b""
            # one copy for each rank: gathering would pad those of all ranks to the size of this one
            box = [pickled]
            with self._watched():
                dist.broadcast_object_list(box, self._global(0), self._group, self.device)
            return cast(T, pickle.loads(box[0]))

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, anything that can be pickled, on every rank."""
        if self.size == 1:
            return [value]
        with self.working():
            with self.synchronized():
                pickled = pickle.dumps(value)  # what cannot be pickled is told before the others wait for it
            return [pickle.loads(found) for found in self._gathered(pickled)]

    def sum(self, number: int) -> int:
        """Sum of a number over the ranks."""
        return sum(self.gather(number))

    def _asked(self, evaluate: Callable[[Tensor], Tensor], x: Tensor, argument: Tensor, value: Tensor) -> Tensor:
        self._send(x, argument)
        return self._sum(evaluate, x, value)

    def _follow(self, evaluate: Callable[[Tensor], Tensor], argument: Tensor, value: Tensor) -> BaseException | None:
        """Serve rank zero until it stops.

        Returns:
            The last error of this rank. Rank zero was told of it and decides what becomes of it: it may well have a
            result to give, when the time was over, say.
        """
        error: BaseException | None = None
        while (x := self._receive(argument)) is not None:
            try:
                self._sum(evaluate, x, value)
            except BaseException as raised:
                error = raised
        return error

    def _send(self, x: Tensor | None, argument: Tensor) -> None:
        message = torch.cat([argument if x is None else x.detach(), argument.new_tensor([_STOP if x is None else _GO])])
        with self._watched():
            dist.broadcast(message, self._global(0), self._group)

    def _receive(self, argument: Tensor) -> Tensor | None:
        message = torch.cat([argument, argument.new_zeros(1)])
        with self._watched():
            dist.broadcast(message, self._global(0), self._group)
            return message[:-1] if float(message[-1]) == _GO else None

    def _sum(self, evaluate: Callable[[Tensor], Tensor], x: Tensor, value: Tensor) -> Tensor:
        """Sum over the ranks, with one more number that counts those that failed."""
        error: BaseException | None = None
        mine = torch.zeros_like(value)
        try:
            mine = evaluate(x).detach()
            self.interrupts.check()
        except BaseException as raised:
            error = raised
        message = torch.cat([mine, mine.new_tensor([0.0 if error is None else 1.0])])
        with self._watched():
            dist.all_reduce(message, group=self._group)
            some_failed = float(message[-1]) > 0
        if some_failed:
            self._raise(error)
        return message[:-1]

    def _vote(self, error: BaseException | None) -> None:
        if error is None and self.interrupts.pending:
            self.interrupts.pending = False
            error = KeyboardInterrupt()
        votes = torch.tensor(0.0 if error is None else 1.0, device=self.device)
        with self._watched():
            dist.all_reduce(votes, group=self._group)
            some_failed = float(votes) > 0
        if some_failed:
            self._raise(error)

    def _raise(self, error: BaseException | None) -> None:
        """Raise this rank's own error, or say whose it was."""
        kind = next((kind for kind in _RAISED_ON_ALL if isinstance(error, kind)), RankError)
        told = str(error) if kind in _RAISED_ON_ALL else f"rank {self.rank}: {type(error).__name__}: {error}"
        mine = None if error is None else (kind.__name__, told)
        failures = [failure for failure in map(pickle.loads, self._gathered(pickle.dumps(mine))) if failure is not None]
        for everybodys in _RAISED_ON_ALL:
            for name, message in failures:
                if name == everybodys.__name__:
                    raise error if isinstance(error, everybodys) else everybodys(message) from error
        raise error if error is not None else RankError("; ".join(message for _, message in failures))

    def _gathered(self, value: bytes) -> list[bytes]:
        gathered: list[Any] = [b""] * self.size
        with self._watched():
            dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def _global(self, rank: int) -> int:
        assert self._group is not None
        return dist.get_global_rank(self._group, rank)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        timer = threading.Timer(_SECONDS_BEFORE_WARNING, self._say_who_waits)
        timer.daemon = True
        timer.start()
        try:
            yield
        except RuntimeError as error:
            raise RankError(f"another rank is gone, or did not answer in time: {error}") from error
        finally:
            timer.cancel()

    def _say_who_waits(self) -> None:
        warnings.warn(
            f"{self.name}: rank {self.rank} of {self.size} has been waiting for the others for"
            f" {_SECONDS_BEFORE_WARNING:.0f} s. torch.distributed gives up after its timeout (30 minutes unless the"
            " strategy was given another): a rank that is slow or gone would end the run then.",
            stacklevel=2,
        )

"""Several processes that share the samples of one analysis: rank zero runs the algorithm, all evaluate the sums."""

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

# Errors that are raised on all ranks alike, so that no rank continues where another one stops.
_RAISED_ON_ALL: tuple[type[BaseException], ...] = (KeyboardInterrupt, TimeUp)

# Well below the 30-minute timeout of torch's collectives, well above the time of a Hessian-vector product.
_SECONDS_BEFORE_WARNING = 60.0

# Far above the time in which a gloo thread releases a tensor, far below a noticeable delay at the end of a program.
_SECONDS_FOR_GLOO_AT_EXIT = 0.1


@cache
def _outlive_gloo() -> None:
    """Delay the exit until gloo's threads have released the tensors of the last collective.

    A thread that releases a tensor while the interpreter shuts down aborts the process (pytorch/pytorch#190489).
    Without ``destroy_process_group``, this happened in 6 of 20 runs of two ranks that ended right after a collective,
    and in none with the delay.
    """
    atexit.register(time.sleep, _SECONDS_FOR_GLOO_AT_EXIT)


class RankError(RuntimeError):
    """Error raised when another rank failed in shared work."""


class Ranks:
    """Processes that work on an analysis: this process alone, or all processes of a process group.

    Rank zero runs the algorithm and makes all decisions. The other ranks evaluate functions on their samples. Ranks
    therefore cannot diverge because of rounding, timing or Ctrl-C. They synchronize by votes, in which each rank
    reports whether it failed or was interrupted. A rank that waits for more than a minute issues a warning.

    Args:
        group: The process group, or None for this process alone.
        name: Name of the analysis in messages.

    Attributes:
        name: Name of the analysis.
        rank: Number of this process, from 0.
        size: Number of processes.
        device: Device of the tensors in collectives.
        interrupts: Ctrl-C of this process, delayed until the next vote while several processes work together.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, name: str = "analysis") -> None:
        self._group, self.name = group, name
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        backend = None if group is None else dist.get_backend(group)
        if backend == "gloo":
            _outlive_gloo()
        # NCCL supports GPU memory only
        on_gpu = backend == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self.interrupts = HeldInterrupts()

    @property
    def is_rank_zero(self) -> bool:
        """True on rank zero, which makes decisions, shows progress and writes files."""
        return self.rank == 0

    @contextmanager
    def working(self) -> Iterator[None]:
        """Delay Ctrl-C inside the block until the next vote; a single process is not affected."""
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

        Each call of ``total`` costs one broadcast and one all-reduce.

        Args:
            evaluate: Computes this rank's part of the sum.
            algorithm: Runs on rank zero only.
            argument: A 1-D tensor with the shape, data type and device of each x.
            value: The same for ``evaluate(x)``.

        Returns:
            The return value of ``algorithm``, on every rank.

        Raises:
            RankError: If another rank failed. An error of this rank is raised unchanged. Ctrl-C and the end of the time
                limit are raised on all ranks.
        """
        if self.size == 1:
            return algorithm(evaluate)
        with self.working():
            result, error, own_error = None, None, None
            try:
                if self.is_rank_zero:
                    result = algorithm(lambda x: self._request(evaluate, x, argument, value))
                else:
                    own_error = self._follow(evaluate, argument, value)
            except BaseException as raised:
                error = raised
            if self.is_rank_zero:
                self._send(None, argument)
            try:
                self._vote(error)
            except RankError as failure:
                raise own_error or failure from None
            return cast(T, self.broadcast(result))

    def run_on_rank_zero(self, function: Callable[[], T]) -> T:
        """Run ``function()`` on rank zero and return its result on every rank."""
        nothing = torch.empty(0, device=self.device)
        return self.run_with_sums(lambda x: x, lambda total: function(), nothing, nothing)

    @contextmanager
    def synchronized(self) -> Iterator[None]:
        """Run a block on every rank, and raise an error on all ranks at its end if one of them failed.

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
        """Return rank zero's value, which must be picklable, on every rank."""
        if self.size == 1:
            return value
        with self.working():
            with self.synchronized():
                pickled = pickle.dumps(value) if self.is_rank_zero else b""
            # a broadcast sends one copy to each rank: an all-gather would pad the values of all ranks to this size
            box = [pickled]
            with self._watched():
                dist.broadcast_object_list(box, self._global(0), self._group, self.device)
            return cast(T, pickle.loads(box[0]))

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, which must be picklable, on every rank."""
        if self.size == 1:
            return [value]
        with self.working():
            with self.synchronized():
                pickled = pickle.dumps(value)  # a value that cannot be pickled fails here, before the others wait
            return [pickle.loads(found) for found in self._gathered(pickled)]

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks, on the CPU. Every rank must pass the same shape and data type."""
        if self.size == 1:
            return values.cpu()
        with self.working(), self._watched():
            total = values.to(self.device, copy=True)
            dist.all_reduce(total, group=self._group)
            return total.cpu()

    def sum(self, number: int) -> int:
        """Return the sum of a number over the ranks."""
        return sum(self.gather(number))

    def _request(self, evaluate: Callable[[Tensor], Tensor], x: Tensor, argument: Tensor, value: Tensor) -> Tensor:
        self._send(x, argument)
        return self._sum(evaluate, x, value)

    def _follow(self, evaluate: Callable[[Tensor], Tensor], argument: Tensor, value: Tensor) -> BaseException | None:
        """Evaluate the requests of rank zero until it stops.

        Returns:
            The last error of this rank. Rank zero has received it and decides how to continue. It may still return a
            result, for example a partial one when the time limit was exceeded.
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
        """Sum ``evaluate(x)`` over the ranks, with one more entry that counts failed ranks."""
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
        """Raise this rank's own error, or one that names the failed ranks."""
        kind = next((kind for kind in _RAISED_ON_ALL if isinstance(error, kind)), RankError)
        text = str(error) if kind in _RAISED_ON_ALL else f"rank {self.rank}: {type(error).__name__}: {error}"
        mine = None if error is None else (kind.__name__, text)
        failures = [failure for failure in map(pickle.loads, self._gathered(pickle.dumps(mine))) if failure is not None]
        for shared_kind in _RAISED_ON_ALL:
            for name, message in failures:
                if name == shared_kind.__name__:
                    raise error if isinstance(error, shared_kind) else shared_kind(message) from error
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
        timer = threading.Timer(_SECONDS_BEFORE_WARNING, self._warn_of_waiting)
        timer.daemon = True
        timer.start()
        try:
            yield
        except RuntimeError as error:
            raise RankError(f"another rank ended or did not respond in time: {error}") from error
        finally:
            timer.cancel()

    def _warn_of_waiting(self) -> None:
        warnings.warn(
            f"{self.name}: rank {self.rank} of {self.size} has been waiting for the other ranks for"
            f" {_SECONDS_BEFORE_WARNING:.0f} s. If a rank is slow or ended, torch.distributed stops the run after its"
            " timeout (30 minutes unless the strategy sets another).",
            stacklevel=2,
        )

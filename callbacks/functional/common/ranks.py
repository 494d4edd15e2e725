"""Several processes that share the samples of one analysis: rank zero leads, the others add their part."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from moe_heads.callbacks.functional.common.interrupts import HeldInterrupts

__all__ = ["RankError", "Ranks"]

T = TypeVar("T")

_STOP, _GO = 0.0, 1.0

# Well below the half hour after which torch's collectives give up, well above a Hessian-vector product.
_SECONDS_BEFORE_WARNING = 60.0


class RankError(RuntimeError):
    """Another rank failed in work that all of them share."""


class Ranks:
    """The processes that work on an analysis: this one alone, or all of a process group.

    Rank zero runs the algorithm and decides; the others evaluate what it asks for on their samples. So no rounding
    error, clock or Ctrl-C on one of them can part their ways. Each wait is watched: after a minute it is said who waits
    for what.

    Args:
        group: The process group, or None for this process alone.
        name: What is being done, for messages.

    Attributes:
        name: What is being done.
        rank: Number of this process, from 0.
        size: Number of processes.
        device: Where tensors have to be that travel between them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, name: str = "analysis") -> None:
        self._group, self.name = group, name
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        # NCCL moves nothing but GPU memory
        on_gpu = group is not None and dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    @property
    def leads(self) -> bool:
        """Whether this is rank zero, which decides, shows and writes."""
        return self.rank == 0

    def led(
        self,
        evaluate: Callable[[Tensor], Tensor],
        lead: Callable[[Callable[[Tensor], Tensor]], T],
        argument: Tensor,
        value: Tensor,
    ) -> T:
        """Run ``lead(total)`` on rank zero, where ``total(x)`` is the sum of ``evaluate(x)`` over all ranks.

        A call of ``total`` is one broadcast and one all-reduce.

        Args:
            evaluate: This rank's part of the sum.
            lead: The algorithm.
            argument: A tensor of the shape, data type and device of each x, 1-D.
            value: The same for ``evaluate(x)``.

        Returns:
            What ``lead`` returned, on every rank.

        Raises:
            RankError: If another rank failed. An error of this rank is raised as it is, Ctrl-C on all of them.
        """
        if self.size == 1:
            return lead(evaluate)
        if not self.leads:
            self._follow(evaluate, argument, value)
            return cast(T, self.broadcast(None))

        def total(x: Tensor) -> Tensor:
            with HeldInterrupts() as interrupts:
                self._send(x, argument)
                return self._sum(evaluate, x, value, interrupts)

        result, error = None, None
        try:
            result = lead(total)
        except BaseException as raised:
            error = raised
        self._send(None, argument)
        self._agree(error)
        return cast(T, self.broadcast(result))

    def first(self, function: Callable[[], T]) -> T:
        """What rank zero's ``function()`` returns, on every rank; the others wait and do nothing."""
        nothing = torch.empty(0, device=self.device)
        return self.led(lambda x: x, lambda total: function(), nothing, nothing)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that every rank runs; an error in one of them is raised in all at its end.

        Raises:
            RankError: If another rank failed.
        """
        error = None
        try:
            yield
        except BaseException as raised:
            if self.size == 1:
                raise
            error = raised
        self._agree(error)

    def broadcast(self, value: T) -> T:
        """Rank zero's value, anything that can be pickled, on every rank."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        with self._watched():
            dist.broadcast_object_list(box, self._global(0), self._group, self.device)
        return cast(T, box[0])

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, anything that can be pickled, on every rank."""
        gathered: list[Any] = [value] * self.size
        if self.size > 1:
            with self._watched():
                dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def sum(self, number: int) -> int:
        """Sum of a number over the ranks."""
        if self.size == 1:
            return number
        total = torch.tensor(number, device=self.device)
        with self._watched():
            dist.all_reduce(total, group=self._group)
            return int(total)

    def _follow(self, evaluate: Callable[[Tensor], Tensor], argument: Tensor, value: Tensor) -> None:
        """Serve rank zero until it stops."""
        error: BaseException | None = None
        with HeldInterrupts() as interrupts:
            while (x := self._receive(argument)) is not None:
                try:
                    self._sum(evaluate, x, value, interrupts)
                except BaseException as raised:
                    error = raised  # rank zero knows of it, and stops
            if error is None and interrupts.pending:
                error = KeyboardInterrupt()
            interrupts.pending = False
        self._agree(error)

    def _send(self, x: Tensor | None, argument: Tensor) -> None:
        message = torch.cat([argument if x is None else x.detach(), argument.new_tensor([_STOP if x is None else _GO])])
        with self._watched():
            dist.broadcast(message, self._global(0), self._group)

    def _receive(self, argument: Tensor) -> Tensor | None:
        message = torch.cat([argument, argument.new_zeros(1)])
        with self._watched():
            dist.broadcast(message, self._global(0), self._group)
            return message[:-1] if float(message[-1]) == _GO else None

    def _sum(
        self, evaluate: Callable[[Tensor], Tensor], x: Tensor, value: Tensor, interrupts: HeldInterrupts
    ) -> Tensor:
        """Sum over the ranks, with one more number that counts those that failed."""
        error: BaseException | None = None
        mine = torch.zeros_like(value)
        try:
            mine = evaluate(x).detach()
            interrupts.check()
        except BaseException as raised:
            error = raised
        message = torch.cat([mine, mine.new_tensor([0.0 if error is None else 1.0])])
        with self._watched():
            dist.all_reduce(message, group=self._group)
            some_failed = float(message[-1]) > 0
        if some_failed:
            self._raise(error)
        return message[:-1]

    def _agree(self, error: BaseException | None) -> None:
        if self.size == 1:
            return
        with HeldInterrupts():
            some_failed = self.sum(0 if error is None else 1) > 0
            if some_failed:
                self._raise(error)

    def _raise(self, error: BaseException | None) -> None:
        """Raise this rank's own error, or say whose it was."""
        is_interrupt = isinstance(error, KeyboardInterrupt)
        mine = None if error is None else (is_interrupt, f"rank {self.rank}: {type(error).__name__}: {error}")
        failures = [failure for failure in self.gather(mine) if failure is not None]
        if error is not None:
            raise error
        if any(interrupted for interrupted, _ in failures):
            raise KeyboardInterrupt
        raise RankError("; ".join(message for _, message in failures))

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
        finally:
            timer.cancel()

    def _say_who_waits(self) -> None:
        warnings.warn(
            f"{self.name}: rank {self.rank} of {self.size} has been waiting for the others for"
            f" {_SECONDS_BEFORE_WARNING:.0f} s. torch.distributed gives up after its timeout (30 minutes unless the"
            " strategy was given another): a rank that is slow or gone would end the run then.",
            stacklevel=2,
        )

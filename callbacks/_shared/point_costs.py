"""Seconds of the points of a series during training, and of the training between them."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["PointCosts"]


class PointCosts:
    """Seconds of each point of a series, and of the training without points.

    Attributes:
        seconds: Seconds of each point, by number of optimizer steps.
        of_run: Seconds of the points since the last `start`.
        earlier: Seconds of the training before it, without points.

    Example:
        >>> from moe_heads.callbacks._shared.point_costs import PointCosts
        >>> costs = PointCosts()
        >>> costs.start()
        >>> with costs.point(10):
        ...     pass
        >>> list(costs.seconds)
        [10]
    """

    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget the points of a training."""
        self.seconds: dict[int, float] = {}
        self.of_run = self.earlier = 0.0
        self._began: float | None = None
        self._ended: float | None = None

    def start(self) -> None:
        """Start, or continue, the clock of the training."""
        self.earlier = self.training_seconds()
        self._began, self._ended, self.of_run = self.clock(), None, 0.0

    def stop(self) -> None:
        """Stop the clock of the training, at its end."""
        _finish_kernels()
        if self._ended is None:
            self._ended = self.clock()

    @contextmanager
    def point(self, step: int) -> Iterator[None]:
        """Count the time inside the block as that of the point at a number of steps."""
        _finish_kernels()  # those of the training
        began = self.clock()
        try:
            yield
        finally:
            _finish_kernels()
            spent = self.clock() - began
            self.seconds[step] = self.seconds.get(step, 0.0) + spent
            self.of_run += spent

    def training_seconds(self, of_others: float = 0.0) -> float:
        """Return the seconds of the training so far without the points.

        Args:
            of_others: Seconds of the points of other series in the same time.
        """
        if self._began is None:
            return self.earlier
        now = self.clock() if self._ended is None else self._ended
        return self.earlier + max(now - self._began - self.of_run - of_others, 0.0)

    def overhead(self, of_others: float = 0.0) -> float:
        """Return the seconds of all points over those of the training without them."""
        return sum(self.seconds.values()) / max(self.training_seconds(of_others), 1e-9)

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed training needs, as plain data."""
        return {"seconds": dict(self.seconds), "training_seconds": self.training_seconds()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state` returned, before `start`."""
        self.forget()
        self.seconds, self.earlier = dict(state["seconds"]), state["training_seconds"]


def _finish_kernels() -> None:
    """Wait for the kernels of a GPU, which would otherwise run in the time of something else."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()

"""How a running analysis is watched: its progress shown, its time limited, and what it has so far kept."""

import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Progress", "Show", "TimeUp"]

Show = Callable[[int, int | None, Mapping[str, float]], None]
"""``show(done, total, quantities)``: steps done, of how many if known, and the quantities that converge, by name."""


class TimeUp(TimeoutError):
    """The time of a `Progress` is over."""


class Progress:
    """Watches one analysis: shows its progress, ends it when its time is over, and holds what it has found so far.

    The functions of this package call `step` after each unit of work, `tick` inside long ones, and `keep` as soon as
    there is something worth having. When the time is over they return that, marked by its attribute ``partial``. An
    error or Ctrl-C passes through them as it is; what was found before it is then to be had from `partial`.

    Args:
        max_time: Seconds from now after which the analysis is to end; None for no limit.
        show: Called at each step; see `Show`.
        end: Why an analysis ends when its time is over, for its ``partial``; by default it names ``max_time``.
        on_tick: Called at each look at the clock; may raise.
        on_warning: Called with each warning of the analysis; by default `warnings.warn`.

    Raises:
        ValueError: If ``max_time`` is not a positive number.

    Example:
        >>> import torch
        >>> from moe_heads.analysis import Progress, sharpness
        >>> model, x = torch.nn.Linear(5, 1), torch.randn(9, 5)
        >>> progress = Progress(max_time=60, show=lambda done, total, quantities: None)
        >>> sharpness(model, lambda m, batch: m(batch).square().mean(), [x], progress=progress).partial
        ''
    """

    def __init__(
        self,
        max_time: float | None = None,
        show: Show | None = None,
        *,
        end: str = "",
        on_tick: Callable[[], None] | None = None,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        check_max_time(max_time)
        self.end = end or f"max_time = {max_time} s was over"
        self._on_tick = on_tick
        self._deadline = math.inf if max_time is None else time.monotonic() + max_time
        self._reserved = 0.0
        self._show = show
        self._on_warning = on_warning
        self._warnings: set[str] = set()
        self._build: Callable[[str], Any] | None = None
        self._forward: Callable[[Callable[[str], Any]], None] | None = None

    def step(self, done: int, total: int | None = None, **quantities: float) -> None:
        """Say that ``done`` of ``total`` steps are done, and which values the quantities that converge have.

        Raises:
            TimeUp: If the time is over and there are more steps to come.
        """
        if self._show is not None:
            self._show(done, total, quantities)
        if done != total:
            self.tick()

    def tick(self) -> None:
        """Look at the clock in the middle of a step.

        Raises:
            TimeUp: If the time is over.
        """
        if self._on_tick is not None:
            self._on_tick()
        if time.monotonic() > self._deadline - self._reserved:
            raise TimeUp(f"{self.end} before there was a result")

    def warn(self, message: str) -> None:
        """Warn of something that the numbers depend on, once for each message and analysis."""
        if message in self._warnings:
            return
        self._warnings.add(message)
        if self._on_warning is None:
            warnings.warn(message, stacklevel=3)
        else:
            self._on_warning(message)

    def reserve(self, seconds: float) -> None:
        """Set time aside at the end for making a result of what was kept."""
        self._reserved = seconds

    def keep(self, build: Callable[[str], Any]) -> None:
        """Hold ``build(reason)``, which makes a result of what there is so far, marked by the reason it ends with."""
        self._build = build
        if self._forward is not None:
            self._forward(build)

    def forget(self) -> None:
        """Let go of what was kept, and of the memory behind it."""
        self._build = self._forward = None

    def part(self, wrap: Callable[[Any], Any]) -> "Progress":
        """A progress for a part of the analysis; ``wrap`` makes a result of the whole of a result of the part."""
        part = copy.copy(self)
        part._build, part._forward = None, lambda build: self.keep(lambda reason: wrap(build(reason)))
        return part

    def partial(self, reason: str) -> Any | None:
        """The result of what there is so far, marked as partial for ``reason``; None when there is nothing yet."""
        return None if self._build is None else self._build(reason)

    def result_in_time(self, error: TimeUp) -> Any:
        """What there is when the time is over.

        Raises:
            TimeUp: If there is nothing.
        """
        result = self.partial(self.end)
        if result is None:
            raise error
        return result


def check_max_time(max_time: float | None) -> None:
    """Refuse a limit that is not a positive number of seconds."""
    is_number = isinstance(max_time, (int, float)) and not isinstance(max_time, bool)
    if max_time is not None and not (is_number and 0 < max_time < math.inf):
        raise ValueError(f"max_time: expected a positive number of seconds or None, got {max_time!r}")

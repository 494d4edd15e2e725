"""Progress of a running analysis: display, time limit and partial results."""

import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from moe_heads.checks import check_callables

__all__ = ["Progress", "Show", "TimeUp"]

Show = Callable[[int, int | None, Mapping[str, float]], None]
"""``show(done, total, quantities)``: finished steps, all steps if known, and the converging quantities by name."""


class TimeUp(TimeoutError):
    """Error raised when the time limit of a `Progress` is exceeded."""


class Progress:
    """Progress display, time limit and partial result of one analysis.

    The functions of this package call `step` after each unit of work, `tick` inside long units, and `keep` as soon as
    there is a partial result. When the time limit is exceeded they return the partial result, marked by its attribute
    ``partial``. Errors and Ctrl-C pass through unchanged, and `partial` then returns the result up to that point.

    Args:
        max_time: Time limit in seconds, counted from now; None for no limit.
        show: ``show(done, total, quantities)``, called at each step: finished steps, all steps or None if unknown, and
            the converging quantities by name.
        end: Reason stored in ``partial`` when the time limit ends an analysis; by default it names ``max_time``.
        on_tick: Called at each check of the time limit; may raise.
        on_warning: Called with each warning of the analysis; by default ``warnings.warn``.

    Raises:
        ValueError: If ``max_time`` is not a positive number, or a function is not callable.

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
        check_callables(show=show, on_tick=on_tick, on_warning=on_warning)
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
        """Report that ``done`` of ``total`` steps are finished, with the values of the converging quantities.

        Raises:
            TimeUp: If the time limit is exceeded and steps remain.
        """
        if self._show is not None:
            self._show(done, total, quantities)
        if done != total:
            self.tick()

    def tick(self) -> None:
        """Check the time limit in the middle of a step.

        Raises:
            TimeUp: If the time limit is exceeded.
        """
        if self._on_tick is not None:
            self._on_tick()
        if time.monotonic() > self._deadline - self._reserved:
            raise TimeUp(f"{self.end} before there was a result")

    def warn(self, message: str) -> None:
        """Issue a warning about the results, once for each message and analysis."""
        if message in self._warnings:
            return
        self._warnings.add(message)
        if self._on_warning is None:
            warnings.warn(message, stacklevel=3)
        else:
            self._on_warning(message)

    def reserve(self, seconds: float) -> None:
        """Reserve time at the end for building a result from the partial data."""
        self._reserved = seconds

    def keep(self, build: Callable[[str], Any]) -> None:
        """Store ``build(reason)``, which builds a partial result marked with the reason for the early end."""
        self._build = build
        if self._forward is not None:
            self._forward(build)

    def forget(self) -> None:
        """Discard the stored partial result and release its memory."""
        self._build = self._forward = None

    def part(self, wrap: Callable[[Any], Any]) -> "Progress":
        """Return a progress for a part of the analysis; ``wrap`` turns its result into a result of the whole."""
        part = copy.copy(self)
        part._build, part._forward = None, lambda build: self.keep(lambda reason: wrap(build(reason)))
        return part

    def partial(self, reason: str) -> Any | None:
        """Build the partial result, marked with ``reason``, or return None if there is none yet."""
        return None if self._build is None else self._build(reason)

    def result_in_time(self, error: TimeUp) -> Any:
        """Return the partial result after the time limit was exceeded.

        Raises:
            TimeUp: If there is no partial result.
        """
        result = self.partial(self.end)
        if result is None:
            raise error
        return result


def check_max_time(max_time: float | None) -> None:
    """Raise an error unless the time limit is a positive number of seconds or None."""
    is_number = isinstance(max_time, (int, float)) and not isinstance(max_time, bool)
    if max_time is not None and not (is_number and 0 < max_time < math.inf):
        raise ValueError(f"max_time: expected a positive number of seconds or None, got {max_time!r}.")

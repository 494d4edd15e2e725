"""Ctrl-C at a moment when it would leave things half done."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["HeldInterrupts"]


class HeldInterrupts:
    """Holds Ctrl-C back inside the block and raises it at the end, unless the block ends with an error anyway.

    Attributes:
        pending: Whether it was pressed.
    """

    def __init__(self) -> None:
        self.pending = False
        self._previous: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._hold)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
        if error is None:
            self.check()

    def check(self) -> None:
        """Raise what was held back."""
        if self.pending:
            self.pending = False
            raise KeyboardInterrupt

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self.pending = True

"""Delay of Ctrl-C while a block runs, so that the block is not left half done."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["HeldInterrupts"]


class HeldInterrupts:
    """A context manager that delays Ctrl-C to the end of its block, and drops it if the block ends with an error.

    A nested block of the same object has no effect. If Ctrl-C is ignored, it stays ignored.

    Attributes:
        pending: Whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.pending = False
        self._depth = 0
        self._previous: Any = None

    def __enter__(self) -> Self:
        self._depth += 1
        is_main = threading.current_thread() is threading.main_thread()
        if self._depth == 1 and is_main and callable(signal.getsignal(signal.SIGINT)):
            self._previous = signal.signal(signal.SIGINT, self._hold)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth:
            return
        previous, self._previous = self._previous, None
        if previous is not None:
            signal.signal(signal.SIGINT, previous)
            if self.pending and error is None:
                self.pending = False
                previous(signal.SIGINT, None)
        self.pending = False

    def check(self) -> None:
        """Raise a delayed Ctrl-C now."""
        if self.pending:
            self.pending = False
            raise KeyboardInterrupt

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self.pending = True

"""A clock that a test sets."""

__all__ = ["Clock"]


class Clock:
    """A clock for `PointCosts.clock`."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

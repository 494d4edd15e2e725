"""Progress of an analysis, where the trainer shows progress at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from lightning.pytorch import Trainer
from tqdm.auto import tqdm

__all__ = ["Advance", "progress_bar"]

_SECONDS_BEFORE_SHOWN = 2.0


class Advance(Protocol):
    """Report that ``done`` of ``total`` steps are done; the total may be unknown."""

    def __call__(self, done: int, total: int | None = None) -> None:
        """Advance to ``done``."""


@contextmanager
def progress_bar(trainer: Trainer, description: str) -> Iterator[Advance]:
    """A bar that appears after two seconds and goes when done; none where the trainer's progress bar is off.

    Args:
        trainer: The trainer.
        description: What is going on.

    Yields:
        A function to call with the steps done and, if known, in all.
    """
    trainers_own = trainer.progress_bar_callback
    shown = trainers_own is not None and getattr(trainers_own, "is_enabled", False) and trainer.is_global_zero
    with tqdm(desc=description, disable=not shown, delay=_SECONDS_BEFORE_SHOWN, leave=False) as bar:

        def advance(done: int, total: int | None = None) -> None:
            if total is not None:
                bar.total = total
            bar.update(done - bar.n)

        yield advance

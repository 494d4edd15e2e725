"""Progress of an analysis, in the style of the Trainer's own progress bar."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from threading import Event, Thread
from time import time
from typing import TextIO

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_warn

from moe_heads.analysis._shared.progress import Show

__all__ = ["progress_bar"]

_Draw = Callable[[int, int | None, str], None]

# Lightning's format, but with the quantities before the time: a narrow terminal cuts the end off
_TQDM_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix} [{elapsed}"
_SECONDS_BEFORE_SHOWN = 2.0
_SECONDS_BETWEEN_DRAWS = 0.5


@contextmanager
def progress_bar(trainer: Trainer | None, description: str) -> Iterator[Show]:
    """A bar that appears after two seconds, whether or not a step is done by then, and goes when the block ends.

    It is drawn by a thread of its own twice a second, so that the elapsed time goes on during a long step. A bar that
    cannot be drawn is a warning when the block ends, never an error.

    Args:
        trainer: The trainer whose progress bar sets the style: rich for a ``RichProgressBar``, tqdm for any other. None
            is shown where that bar is missing or disabled, nor on other ranks than zero. Without a trainer: tqdm.
        description: What is going on.

    Yields:
        ``show(done, total, quantities)``: steps done, steps in all (None: unknown) and what converges, by name, to be
        shown with 3 significant digits. The total may change from call to call; a new phase begins again at 0.
    """
    bar = _bar_like_the_trainers(trainer, description)
    if bar is None:
        yield lambda done, total, quantities: None
        return

    latest: tuple[int, int | None, str] = (0, None, "")
    ended = Event()
    errors: list[Exception] = []

    def show(done: int, total: int | None, quantities: Mapping[str, float]) -> None:
        nonlocal latest
        latest = (done, total, ", ".join(f"{name}={value:.3g}" for name, value in quantities.items()))

    def draw_until_ended() -> None:
        try:
            with bar as draw:
                seconds = _SECONDS_BEFORE_SHOWN
                while not ended.wait(seconds):
                    draw(*latest)
                    seconds = _SECONDS_BETWEEN_DRAWS
        except Exception as error:  # a closed stream, a second live display: no reason to end an analysis
            errors.append(error)

    # One thread creates, draws and removes the bar, so the bar needs no lock.
    thread = Thread(target=draw_until_ended, name=f"progress of {description}", daemon=True)
    thread.start()
    try:
        yield show
    finally:
        ended.set()
        thread.join()
        for error in errors:
            rank_zero_warn(f"{description}: its progress bar failed with {type(error).__name__}: {error}")


def _bar_like_the_trainers(trainer: Trainer | None, description: str) -> AbstractContextManager[_Draw] | None:
    if trainer is None:
        return _tqdm_bar(description, sys.stderr)
    own = trainer.progress_bar_callback
    # the base class of progress bars has no is_enabled
    if own is None or not getattr(own, "is_enabled", True) or not trainer.is_global_zero:
        return None
    if isinstance(own, RichProgressBar):
        return _rich_bar(description, own)
    return _tqdm_bar(description, sys.stdout)  # where the Trainer's bars are


@contextmanager
def _tqdm_bar(description: str, file: TextIO) -> Iterator[_Draw]:
    with Tqdm(
        desc=description,
        file=file,
        leave=False,
        dynamic_ncols=True,
        smoothing=0,
        delay=_SECONDS_BEFORE_SHOWN,
    ) as bar:

        def draw(done: int, total: int | None, quantities: str) -> None:
            if done < bar.n:
                # a new phase has a speed of its own
                bar.start_t = bar.last_print_t = time()
                bar.initial = done
            bar.n, bar.total = done, total
            bar.bar_format = _TQDM_FORMAT + ("]" if total is None else "<{remaining}]")
            bar.set_postfix_str(quantities, refresh=False)
            # refresh() never releases the lock of all bars if it fails, and the Trainer's would wait for this thread
            with bar.get_lock():
                bar.display()
            # close() takes a bar within its delay for one never shown, and leaves it there
            bar.delay = 0

        yield draw


@contextmanager
def _rich_bar(description: str, own: RichProgressBar) -> Iterator[_Draw]:
    # an optional dependency, there where its bar is
    import rich.progress
    from rich.table import Column

    theme = own.theme
    progress = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", style=theme.description, markup=False),
        rich.progress.BarColumn(
            complete_style=theme.progress_bar,
            finished_style=theme.progress_bar_finished,
            pulse_style=theme.progress_bar_pulse,
        ),
        # on a narrow terminal, only the bar shrinks
        rich.progress.MofNCompleteColumn(table_column=Column(no_wrap=True)),
        rich.progress.TimeElapsedColumn(table_column=Column(no_wrap=True)),
        rich.progress.TimeRemainingColumn(table_column=Column(no_wrap=True)),
        rich.progress.TextColumn("{task.fields[quantities]}", style=theme.metrics, markup=False),
        console=rich.get_console(),
        auto_refresh=False,
        transient=True,
    )
    # one of the two is visible: a task cannot go back to an unknown total
    counted = progress.add_task(description, total=1, visible=False, quantities="")
    uncounted = progress.add_task(description, total=None, visible=False, quantities="")
    host = own.progress if own.progress is not None and own.progress.live.is_started else None

    def draw(done: int, total: int | None, quantities: str) -> None:
        shown, hidden = (uncounted, counted) if total is None else (counted, uncounted)
        if done < progress.tasks[shown].completed:
            progress.reset(shown)
        progress.update(hidden, visible=False)
        progress.update(shown, total=total, completed=done, visible=True, quantities=quantities)
        if host is None:
            progress.live.start()
            progress.refresh()
        else:
            # Before 14.1, rich refuses a second live display; a task among the Trainer's would stay in its list.
            host.get_renderables = lambda: chain(type(host).get_renderables(host), progress.get_renderables())  # type: ignore[method-assign]
            host.refresh()

    try:
        yield draw
    finally:
        if host is None:
            progress.live.stop()
        elif vars(host).pop("get_renderables", None) is not None:
            host.refresh()

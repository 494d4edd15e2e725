"""Progress bar of an analysis, in the style of the Trainer's own progress bar."""

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
from moe_heads.callbacks._shared.lightning_packages import under_both_names

__all__ = ["progress_bar"]

_Draw = Callable[[int, int | None, str], None]

# Lightning's format, but with the quantities before the time, since a narrow terminal cuts off the end
_TQDM_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix} [{elapsed}"
_SECONDS_BEFORE_SHOWN = 2.0
_SECONDS_BETWEEN_DRAWS = 0.5


@contextmanager
def progress_bar(trainer: Trainer | None, description: str) -> Iterator[Show]:
    """Show a progress bar that appears after two seconds and disappears when the block ends.

    A separate thread draws it twice a second, so that the elapsed time advances during a long step. A bar that cannot
    be drawn causes a warning at the end of the block, not an error.

    Args:
        trainer: The trainer whose progress bar sets the style: rich for a ``RichProgressBar``, tqdm for any other. No
            bar is shown if that bar is missing or disabled, or on ranks other than zero. Without a trainer: tqdm.
        description: Text of the bar.

    Yields:
        ``show(done, total, quantities)``: finished steps, all steps (None: unknown), and the converging quantities by
        name, shown with 3 significant digits. The total may change between calls. A new phase starts again at 0.
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
        except Exception as error:  # a closed stream or a second live display must not end an analysis
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
            rank_zero_warn(f"{description}: the progress bar failed with {type(error).__name__}: {error}")


def _bar_like_the_trainers(trainer: Trainer | None, description: str) -> AbstractContextManager[_Draw] | None:
    if trainer is None:
        return _tqdm_bar(description, sys.stderr)
    own = trainer.progress_bar_callback
    # the base class of progress bars has no is_enabled
    if own is None or not getattr(own, "is_enabled", True) or not trainer.is_global_zero:
        return None
    if isinstance(own, under_both_names(RichProgressBar)):
        return _rich_bar(description, own)
    return _tqdm_bar(description, sys.stdout)  # the stream of the Trainer's bars


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
                # a new phase has its own speed
                bar.start_t = bar.last_print_t = time()
                bar.initial = done
            bar.n, bar.total = done, total
            bar.bar_format = _TQDM_FORMAT + ("]" if total is None else "<{remaining}]")
            bar.set_postfix_str(quantities, refresh=False)
            # a failed refresh() never releases the lock of all bars, and the Trainer's bars would wait for this thread
            with bar.get_lock():
                bar.display()
            # close() treats a bar within its delay as never shown, and does not remove it
            bar.delay = 0

        yield draw


@contextmanager
def _rich_bar(description: str, own: RichProgressBar) -> Iterator[_Draw]:
    # an optional dependency, installed if a RichProgressBar exists
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
            # before 14.1, rich does not support a second live display; a task among the Trainer's would stay in its
            # list
            host.get_renderables = lambda: chain(type(host).get_renderables(host), progress.get_renderables())  # type: ignore[method-assign]
            host.refresh()

    try:
        yield draw
    finally:
        if host is None:
            progress.live.stop()
        elif vars(host).pop("get_renderables", None) is not None:
            host.refresh()

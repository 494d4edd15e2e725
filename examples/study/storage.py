"""Files of a study that appear whole or not at all, and folders that one process at a time works in."""

import fcntl
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib.figure import Figure

_DPI = 150  # sharp on a page, and still small enough to stand inside of it


def replace(path: Path, content: str | bytes) -> None:
    """Write a whole file or leave the old one; nothing half-written stays behind on a full disk."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as a PNG, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=_DPI)
    replace(path, picture.getvalue())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process is inside such a block for the folder."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether this process may work in the folder; no other may until the block ends or this process does.

    Several processes, one for each device, can so share one study: each takes the runs that nobody works on.

    Yields:
        False where another process works.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True

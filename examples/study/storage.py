"""Atomic writes of files, and locks of folders between processes."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from matplotlib.figure import Figure

_DPI = 150  # sharp on a page, and small enough to be embedded


def replace(path: Path, content: str | bytes) -> None:
    """Write a file atomically; on failure, such as a full disk, the old file stays and no partial file remains."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure atomically as a PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=_DPI)
    replace(path, picture.getvalue())


def locked(folder: Path) -> FileLock:
    """Return a lock that one process at a time holds for the folder."""
    return FileLock(folder / ".lock")


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Claim a folder for this process until the block or the process ends.

    Several processes, one for each device, can share one study this way. Each takes the runs that no other works on.

    Yields:
        Whether the folder is claimed. False means that another process works in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder).acquire(timeout=0):
            yield True
    except Timeout:
        yield False

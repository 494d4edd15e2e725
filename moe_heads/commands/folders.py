"""Folders that exist as a whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_heads.commands.errors import CommandError

__all__ = ["check_free", "new_folder"]


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Check before any work that a folder may be written.

    Raises:
        CommandError: If it exists with content and ``overwrite`` is not set, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"--out: expected a folder, got the file {str(folder)!r}.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise CommandError(
            f"--out: expected an empty or new folder, got {str(folder)!r}: add --overwrite to replace it."
        )


@contextmanager
def new_folder(folder: Path, *, marker: str, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder next to ``folder``, and rename it when the block ends without an error.

    Args:
        folder: The folder to write.
        marker: Name of the file that every folder of this kind has. Only such a folder is replaced.
        overwrite: Whether to replace an existing folder.

    Yields:
        The temporary folder.

    Raises:
        CommandError: If the folder cannot be written, or has content of another kind.
    """
    check_free(folder, overwrite=overwrite)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise CommandError(
            f"--out: expected a folder with {marker} to overwrite, got {str(folder)!r} with other files."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise CommandError(
            f"--out: expected a folder that can be written, got {str(folder)!r}: {error.strerror}."
        ) from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        _replace(folder, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(folder: Path, temporary: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    folder.rename(old / folder.name)
    try:
        temporary.rename(folder)
    except OSError:
        (old / folder.name).rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

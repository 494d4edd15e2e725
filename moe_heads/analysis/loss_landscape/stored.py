"""Arrays in a file that is whole at every moment, or that is told to be damaged."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["damaged", "read_arrays", "write_arrays"]

# What NumPy and the archive raise for a file that is cut, overwritten, or of another kind.
_DAMAGES = (OSError, ValueError, EOFError, zipfile.BadZipFile)


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """All arrays of an ``.npz`` by name; None where there is no file.

    Raises:
        ValueError: If it cannot be read.
    """
    if not Path(path).exists():
        return None
    try:
        with Path(path).open("rb") as file:
            stored = np.load(file)
            if not isinstance(stored, np.lib.npyio.NpzFile):
                raise ValueError("no archive of arrays")
            return {name: stored[name] for name in stored.files}
    except _DAMAGES as error:
        raise damaged(path, error) from error


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Write an ``.npz``; a run that is killed meanwhile leaves the file of before."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(target)


def damaged(path: str | os.PathLike[str], error: Exception) -> ValueError:
    """The error for a file that is not what it should be."""
    return ValueError(
        f"resume: expected a file that loss_landscape wrote, got {path}: {error}: give another file, or delete it"
    )

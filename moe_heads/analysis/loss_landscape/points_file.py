"""Files of measured points and of eigenvectors, from which an interrupted analysis continues."""

import os
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_heads.analysis._shared.digest import digest_of
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.loss_landscape.evaluate import Point

__all__ = ["Place", "PointCheckpoint", "stored_eigenvectors"]

Place = tuple[float, ...]
"""Coordinates of a point."""

# A small model takes milliseconds for a point. An interruption loses at most the points of this time.
_SECONDS_BETWEEN_WRITES = 2.0

# Errors of NumPy and of the archive for a file that is truncated, overwritten or of another format.
_READ_ERRORS = (OSError, ValueError, EOFError, zipfile.BadZipFile)


class PointCheckpoint:
    """A file of measured points, which each write replaces as a whole.

    A different grid along the same directions takes over the points that both share.

    Args:
        path: The file, ``.npz``.
        belongs_to: What the points depend on, by name: weights, samples, directions, functions. Each is a collection of
            tensors and plain values. The file holds their digests.
    """

    def __init__(self, path: str | os.PathLike[str], belongs_to: Mapping[str, Iterable[Any]]) -> None:
        self._path = Path(path)
        self._digests = {f"digest_{name}": digest_of(values) for name, values in belongs_to.items()}
        self._last_write = time.monotonic()

    def load(self) -> dict[Place, Point]:
        """Return the points in the file, or none if the file does not exist.

        Raises:
            ValueError: If they belong to something else, or the file is damaged or of another format.
        """
        arrays = _read_arrays(self._path)
        if arrays is None:
            return {}
        try:
            digests = {name: arrays[name].tobytes() for name in self._digests}
            places, values = arrays["places"].tolist(), arrays["values"].tolist()
            points = {
                tuple(place): Point(loss, fixed, accuracy, flips, round(num_samples))
                for place, (loss, fixed, accuracy, flips, num_samples) in zip(places, values, strict=True)
            }
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(self._path, error) from error
        for name, digest in self._digests.items():
            if digests[name] != digest:
                name = name.removeprefix("digest_")
                raise ValueError(
                    f"resume: expected points of the same {name}, got a file of different {name}, {self._path}. Pass"
                    " another file or delete it."
                )
        return points

    def write(self, points: Mapping[Place, Point], *, now: bool = False) -> None:
        """Write the points, either now or only if some time has passed since the last write."""
        if not now and time.monotonic() < self._last_write + _SECONDS_BETWEEN_WRITES:
            return
        arrays: dict[str, Any] = {name: np.frombuffer(digest, np.uint8) for name, digest in self._digests.items()}
        arrays["places"] = np.array(list(points), dtype=np.float64)
        arrays["values"] = np.array([[*point.values, point.num_samples] for point in points.values()])
        _write_arrays(self._path, arrays)
        self._last_write = time.monotonic()


def stored_eigenvectors(path: str | os.PathLike[str], ranks: Ranks, compute: Callable[[], Tensor]) -> Tensor:
    """Return the eigenvectors in the file of rank zero. Without a file, compute and write them.

    Eigenvectors that are computed again differ by rounding, and stored points along them could not be reused.

    Args:
        path: The file, ``.npz``.
        ranks: The processes that share the work.
        compute: Computes the eigenvectors, (number, P).

    Returns:
        The eigenvectors, float64 if they were computed in float64, otherwise float32.

    Raises:
        ValueError: If the file is damaged.
    """
    found = ranks.run_on_rank_zero(lambda: _read_eigenvectors(path))
    if found is None:
        found = compute()
        found = found.detach().cpu().to(torch.float64 if found.dtype == torch.float64 else torch.float32)
        arrays = {"eigenvectors": found.numpy()}
        ranks.run_on_rank_zero(lambda: _write_arrays(path, arrays))
    return found


def _read_eigenvectors(path: str | os.PathLike[str]) -> Tensor | None:
    arrays = _read_arrays(path)
    if arrays is None:
        return None
    if "eigenvectors" not in arrays:
        raise _damaged(path, KeyError("eigenvectors"))
    return torch.from_numpy(arrays["eigenvectors"])


def _read_arrays(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return all arrays of an ``.npz`` by name, or None if the file does not exist."""
    if not Path(path).exists():
        return None
    try:
        with Path(path).open("rb") as file:
            stored = np.load(file)
            if not isinstance(stored, np.lib.npyio.NpzFile):
                raise ValueError("no archive of arrays")
            return {name: stored[name] for name in stored.files}
    except _READ_ERRORS as error:
        raise _damaged(path, error) from error


def _write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Write an ``.npz``. A process that is killed meanwhile leaves the previous file."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(target)


def _damaged(path: str | os.PathLike[str], error: Exception) -> ValueError:
    return ValueError(
        f"resume: expected a file that loss_landscape wrote, got {path}: {error}. Pass another file or delete it."
    )

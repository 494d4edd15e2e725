"""The points of a landscape on disk, so that a scan that was cut short goes on where it ended."""

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_heads.analysis._shared.digest import digest_of
from moe_heads.analysis.loss_landscape.point import Point
from moe_heads.analysis.loss_landscape.stored import damaged, read_arrays, write_arrays

__all__ = ["Place", "Record"]

Place = tuple[float, ...]
"""Coordinates of a point."""

# Points come in milliseconds for a small model; a write now and then loses little.
_SECONDS_BETWEEN_WRITES = 2.0


class Record:
    """A file of measured points, replaced as a whole whenever it is written.

    Another grid along the same directions takes over the points that it shares.

    Args:
        path: The file, ``.npz``.
        belongs_to: What the points depend on, by name: weights, samples, directions, functions. Any collection of
            tensors and plain values; a digest of each is in the file.
    """

    def __init__(self, path: str | os.PathLike[str], belongs_to: Mapping[str, Iterable[Any]]) -> None:
        self._path = Path(path)
        self._digests = {f"digest_{name}": digest_of(values) for name, values in belongs_to.items()}
        self._last_write = time.monotonic()

    def load(self) -> dict[Place, Point]:
        """The points in the file; none where there is no file.

        Raises:
            ValueError: If they belong to something else, or it is damaged or another kind of file.
        """
        arrays = read_arrays(self._path)
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
            raise damaged(self._path, error) from error
        for name, digest in self._digests.items():
            if digests[name] != digest:
                raise ValueError(
                    f"resume: expected points of the same {name.removeprefix('digest_')}; those in {self._path} belong"
                    " to others: give another file, or delete it"
                )
        return points

    def write(self, found: Mapping[Place, Point], *, now: bool = False) -> None:
        """Write the points, if some time has gone by since the last time or it has to be now."""
        if not now and time.monotonic() < self._last_write + _SECONDS_BETWEEN_WRITES:
            return
        arrays: dict[str, Any] = {name: np.frombuffer(digest, np.uint8) for name, digest in self._digests.items()}
        arrays["places"] = np.array(list(found), dtype=np.float64)
        arrays["values"] = np.array([[*point.values, point.num_samples] for point in found.values()])
        write_arrays(self._path, arrays)
        self._last_write = time.monotonic()

"""The points of a landscape on disk, so that a scan that was cut short goes on where it ended."""

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_heads.callbacks.functional.common.digest import digest_of
from moe_heads.callbacks.functional.landscape.point import Point

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
        belongs_to: What the points depend on, by name: weights, samples, directions, options. Any collection of tensors
            and plain values; a digest of each is in the file.
    """

    def __init__(self, path: str | os.PathLike[str], belongs_to: Mapping[str, Iterable[Any]]) -> None:
        self._path = Path(path)
        self._digests = {f"digest_{name}": digest_of(values) for name, values in belongs_to.items()}
        self._last_write = time.monotonic()

    def load(self) -> dict[Place, Point]:
        """The points in the file; none where there is no file.

        Raises:
            ValueError: If they belong to something else, or it is another kind of file.
        """
        if not self._path.exists():
            return {}
        try:
            with np.load(self._path) as stored:
                arrays = {name: stored[name] for name in stored.files}
            digests = {name: arrays[name].tobytes() for name in self._digests}
            places, values = arrays["places"].tolist(), arrays["values"].tolist()
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ValueError(f"resume: expected a file that loss_landscape wrote; got {self._path}: {error}") from error
        for name, digest in self._digests.items():
            if digests[name] != digest:
                raise ValueError(
                    f"resume: expected points of the same {name.removeprefix('digest_')}; those in {self._path} belong"
                    " to others: give another file, or delete it"
                )
        return {
            tuple(place): Point(loss, fixed, accuracy, flips, round(num_samples))
            for place, (loss, fixed, accuracy, flips, num_samples) in zip(places, values, strict=True)
        }

    def write(self, found: Mapping[Place, Point], *, now: bool = False) -> None:
        """Write the points, if some time has gone by since the last time or it has to be now."""
        if not now and time.monotonic() < self._last_write + _SECONDS_BETWEEN_WRITES:
            return
        arrays: dict[str, Any] = {name: np.frombuffer(digest, np.uint8) for name, digest in self._digests.items()}
        arrays["places"] = np.array(list(found), dtype=np.float64)
        arrays["values"] = np.array([[*point.values, point.num_samples] for point in found.values()])
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # a run that is killed while it writes leaves the file of before
        partial = self._path.with_name(f"{self._path.name}.partial")
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.replace(self._path)
        self._last_write = time.monotonic()

"""One piece of the evidence: its settings, its time, and its JSON file."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.timing import machine

__all__ = ["Piece", "Report", "Settings", "is_finished", "run_piece"]

Report = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of all pieces.

    Attributes:
        device: Device of the measurements.
        quick: Whether to use the smallest sizes, to try the steps.
        images: Folder with train/<class>/ and test/<class>/ image files, or None.
        out: Folder of the JSON files.
        deadline: Time of `time.monotonic` at which a piece has to end.
    """

    device: torch.device
    quick: bool
    images: Path | None
    out: Path
    deadline: float

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(self.deadline - time.monotonic(), 0.0)


Piece = Callable[[Settings, Report, Callable[[], None]], bool]
"""``piece(settings, result, save) -> is_finished``: fills the result, calls ``save`` after each part of it."""


def is_finished(path: Path, settings: Settings) -> bool:
    """Return whether a file holds a finished piece of this commit, device and size."""
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    now = _origin(settings)
    return bool(found["finished"]) and all(found[key] == now[key] for key in ("device", "commit", "quick"))


def run_piece(name: str, piece: Piece, settings: Settings) -> Report:
    """Run a piece, and write its file after each part. A missing package skips it, another error ends it.

    Parts of an earlier run of the same commit, device and size are kept.
    """
    path = settings.out / f"{name}.json"
    report: Report = {**_origin(settings), "machine": machine(), "seconds": 0.0, "finished": False, "result": {}}
    if path.exists():
        before = json.loads(path.read_text())
        if all(before[key] == report[key] for key in ("device", "commit", "quick")):
            report["result"], report["seconds"] = before["result"], before["seconds"]
    start, spent = time.perf_counter(), report["seconds"]

    def save() -> None:
        report["seconds"] = round(spent + time.perf_counter() - start, 1)
        path.write_text(json.dumps(report, indent=1) + "\n")

    try:
        report["finished"] = piece(settings, report["result"], save)
    except ImportError as error:
        report["skipped"] = str(error)
    except Exception as error:  # the other pieces still run, and the file says what went wrong
        report["error"] = f"{type(error).__name__}: {error}"
    save()
    return report


def _origin(settings: Settings) -> Report:
    is_cuda = settings.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else settings.device.type,
        "cuda": torch.version.cuda if is_cuda else None,
        "torch": torch.__version__,
        "commit": machine()["commit"],
        "quick": settings.quick,
    }

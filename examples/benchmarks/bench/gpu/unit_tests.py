"""The tests with the marker ``gpu``."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench.gpu.piece import Report, Settings

__all__ = ["unit_tests"]

_ROOT = Path(__file__).parents[4]


def unit_tests(settings: Settings, result: Report, save: Callable[[], None]) -> bool:
    """Run the tests; on a CPU they are collected only.

    Raises:
        ImportError: If pytest is not installed.
    """
    if importlib.util.find_spec("pytest") is None:
        raise ImportError("pytest is not installed")
    collect = [] if settings.device.type == "cuda" else ["--collect-only"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *collect]
    try:
        done = subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, check=False, timeout=max(settings.seconds_left, 1)
        )
    except subprocess.TimeoutExpired:
        result |= {"returncode": None, "tail": "the time was over"}
        return False
    result |= {"returncode": done.returncode, "tail": done.stdout[-1500:] + done.stderr[-500:]}
    return done.returncode == 0

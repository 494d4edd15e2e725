"""The scripts of examples/benchmarks as modules of a test."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

from tests.support.sources import ROOT


@contextmanager
def benchmark_script(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import a script, which leaves torch's threads as they are; forget it, and what lies next to it, at the end."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    yield importlib.import_module(name)
    for module in set(sys.modules) - before:
        if module.partition(".")[0] in {"bench", name}:
            del sys.modules[module]

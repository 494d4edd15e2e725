"""Benchmark of imports at small size: paired differences."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.benchmark_scripts import benchmark_script


def test_differences_are_paired_and_the_first_round_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rounds = tmp_path / "out.json", 3
    durations: dict[str, Iterator[float]] = {
        "torch": iter([100.0, 1.0, 5.0, 1.0]),
        "moe_heads": iter([200.0, 1.5, 5.25, 1.25]),
    }
    with benchmark_script("import_time", monkeypatch) as script:
        monkeypatch.setattr(script, "seconds_of", lambda module: next(durations.get(module, iter([7.0]))))
        report = script.main(["--rounds", str(rounds), "--out", str(out)])
    assert json.loads(out.read_text()) == report
    assert report["seconds"]["torch"] == [1.0, 5.0, 1.0]
    assert report["beyond_torch"]["torch"] == 0 and report["beyond_torch"]["moe_heads"] == 0.25


def test_a_process_imports_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    with benchmark_script("import_time", monkeypatch) as script:
        assert script.seconds_of("json") > 0

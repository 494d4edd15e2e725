"""Benchmark of the checks for inert experts at small size."""

import json
from pathlib import Path

import pytest

from tests.support.benchmark_scripts import benchmark_script


def test_parts_are_kept_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    with benchmark_script("expert_health", monkeypatch) as script:
        monkeypatch.setattr(script, "MATRICES", ((20, 70), (80, 80)))
        monkeypatch.setattr(script, "LAYERS", ((4, 8, 8),))
        first = script.main(["--only", "accuracy", "--out", str(out)])
        report = script.main(["--only", "cost", "--rounds", "1", "--out", str(out)])
    assert json.loads(out.read_text()) == report
    assert report["accuracy"] == first["accuracy"]
    errors = report["accuracy"]["results"]
    assert len(errors) == 8 and all(-1e-4 < error < 0.05 for error in errors.values())
    (times,) = report["cost"]["results"].values()
    assert set(times) == {"training_step", "end_of_epoch", "whole_analysis"} and min(times.values()) > 0


def test_norms_of_a_broken_and_of_a_healthy_head(monkeypatch: pytest.MonkeyPatch) -> None:
    with benchmark_script("expert_health", monkeypatch) as script:
        zero = "second layer of expert 0 zero"
        monkeypatch.setattr(script, "HEALTHY", script.HEALTHY[:1])
        monkeypatch.setattr(script, "BROKEN", {zero: script.BROKEN[zero]})
        healthy, broken = script.norms(seeds=1, epochs=1).values()
    assert healthy[0]["output_norms_min"] > 0.1 and healthy[0]["weight_norms_min"] > 0.3
    assert broken[0]["output_norms_of_expert_0"] == broken[0]["weight_norms_of_expert_0"] == 0

"""Benchmark of products with the Gauss-Newton matrix at small size: its costs and errors."""

import json
from pathlib import Path

import pytest

from tests.support.benchmark_scripts import benchmark_script


def test_costs_in_gradients_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    with benchmark_script("gauss_newton", monkeypatch) as script:
        times = {"gradient": 2.0, "Hessian": 4.0, "Gauss-Newton": 3.0}
        monkeypatch.setattr(script, "time_interleaved", lambda calls, rounds, loaded: {n: times[n] for n in calls})
        script.main(["--small", "--rounds", "1", "--out", str(out)])
    report = json.loads(out.read_text())
    assert list(report["cases"]) == ["MLP", "GPT-2"]
    for case in report["cases"].values():
        assert case["gradients"] == {"Hessian": 2.0, "Gauss-Newton": 1.5}
        assert 0 < case["relative_error"]["Gauss-Newton"] < 1e-5

"""Benchmark of large models at small size: its memory, times and eigenvalue."""

import json
from pathlib import Path

import pytest

from tests.support.benchmark_scripts import benchmark_script

pytest.importorskip("transformers")


def test_memory_times_and_eigenvalue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    with benchmark_script("large_models", monkeypatch) as script:
        script.main(["--model", "tiny", "--steps", "2", "--threads", "1", "--out", str(out)])
    (entry,) = json.loads(out.read_text())
    assert entry["converged"] and entry["residual"] <= 1e-3 and entry["lambda_max"] > 0
    assert 0 < entry["first_value_seconds"] <= entry["total_seconds"]
    assert entry["num_products"] > 0 and entry["peak_gib"] >= 0 and entry["machine"]["threads"] == 1

"""Benchmark of batched landscape points at small size."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.benchmark_scripts import benchmark_script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with benchmark_script("landscape_vmap", monkeypatch) as script:
        yield script


def test_all_ways_give_the_same_losses(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "time_interleaved", lambda ways, rounds: dict.fromkeys(ways, 1.0))
    out = tmp_path / "out.json"
    sizes = ["--samples", "7", "--features", "6", "--side", "3", "--chunks", "2", "--rounds", "1"]
    script.main([*sizes, "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["head"] for row in rows] == ["dense", "soft", "sparse"]
    for row in rows:
        assert row["ms"].keys() == {"loop", "vmap_2"}
        assert 0 <= row["largest_relative_difference"]["vmap_2"] < 1e-5
    assert "dense, 7 samples: loop 1.0 ms; relative to it: vmap_2 1.00" in capsys.readouterr().out

"""Example that tracks the sharpness of a small GPT, at small size, with dropout."""

import json
from pathlib import Path

import pytest

from tests.support.sources import ROOT


@pytest.mark.filterwarnings("ignore:.*did not converge", "ignore:.*could not exclude")
@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_the_training_is_not_changed_and_both_series_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: str
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import track_sharpness

    monkeypatch.setattr(track_sharpness, "documentation", lambda: iter([str(number) for number in range(999)]))
    out, figure = tmp_path / "out.json", tmp_path / "figure.png"
    sizes = ["--sequences", "24", "--context", "8", "--width", "8", "--batch-size", "4", "--num-samples", "2"]
    every = ["--critical-every", "2", "--sharpness-every", "3", "--dropout", dropout]
    report = track_sharpness.main([*sizes, *every, "--out", str(out), "--figure", str(figure)])
    assert figure.stat().st_size > 0
    written = json.loads(out.read_text())
    assert list(written["sharpness"]) == ["3", "6"] and list(written["critical_sharpness"]) == ["2", "4", "6"]
    assert report["num_steps"] == 6 and report["overhead"]["cpu"] > -1

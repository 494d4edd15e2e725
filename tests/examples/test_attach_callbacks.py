"""Example with an existing LightningModule."""

from pathlib import Path

import pytest

from tests.support.sources import ROOT


def test_runs_and_converges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import attach_callbacks

    result = attach_callbacks.main(max_epochs=3).results["train"]
    assert result.eigenvalues_converged
    assert result.eigenvalues[0] > 0

"""Progress bars appear only where the trainer shows progress."""

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar

from moe_heads.callbacks import progress
from tests.support.lightning_models import trainer


def test_shows_the_steps_where_the_trainer_shows_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BEFORE_SHOWN", 0.0)
    with progress.progress_bar(trainer(TQDMProgressBar(), enable_progress_bar=True), "sharpness/train") as advance:
        advance(3, 12)
        advance(12, 12)
    assert "sharpness/train" in capsys.readouterr().err


def test_silent_where_the_trainer_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BEFORE_SHOWN", 0.0)
    with progress.progress_bar(trainer(), "sharpness/train") as advance:
        advance(3)
    assert capsys.readouterr().err == ""

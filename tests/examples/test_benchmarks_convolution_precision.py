"""Benchmark of the precisions at small size: computation of the rates."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.benchmark_scripts import benchmark_script


def test_rates_are_operations_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    with benchmark_script("convolution_precision", monkeypatch) as script:
        monkeypatch.setattr(script, "time_interleaved", lambda steps, rounds: dict.fromkeys(steps, 2.0))
        script.main(["--batch", "2", "--rounds", "1", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["chosen"] in ("32-true", "bf16-mixed")
    # 2 images of 7x7 pixels, 9 x 128 x 128 weights, 6 operations each, in 2 ms
    expected = 2 * 49 * 9 * 128 * 128 * 6 / 2e-3 / 1e9
    assert report["cases"]["128 channels, 7x7"] == pytest.approx({"32-true": expected, "bf16-mixed": expected})


def test_a_step_gives_gradients_in_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    with benchmark_script("convolution_precision", monkeypatch) as script:
        made = []
        conv2d = torch.nn.Conv2d
        monkeypatch.setattr("torch.nn.Conv2d", lambda *a, **k: made.append(conv2d(*a, **k)) or made[-1])
        script.training_step(4, 5, 2, torch.bfloat16)()
    assert made[0].weight.grad.dtype == torch.bfloat16 and made[0].weight.grad.abs().sum() > 0

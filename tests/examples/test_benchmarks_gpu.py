"""The GPU script runs all its steps on a CPU."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.benchmark_scripts import benchmark_script


@pytest.mark.slow  # 30 s
def test_a_dry_run_writes_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    with benchmark_script("gpu", monkeypatch) as gpu:
        gpu.main(["--dry-run", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["tests"]["result"]["returncode"] == 0
    (row,) = report["heads"]["result"]
    assert row["dense_ms"] > 0 and row["all_ms"] > 0
    assert any("p50" in key for key in report["inference_timing"]["result"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with benchmark_script("gpu", monkeypatch) as gpu, pytest.raises(SystemExit):
        gpu.main([])
    assert "CUDA is not available on this machine" in capsys.readouterr().err

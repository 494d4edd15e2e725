"""The GPU script runs all its pieces on a CPU, keeps what it has, and continues."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.benchmark_scripts import benchmark_script


@pytest.mark.slow  # two minutes on a quiet machine
@pytest.mark.timeout(900)
def test_a_dry_run_writes_every_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with benchmark_script("gpu", monkeypatch) as gpu:
        states = gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path)])
    assert states == dict.fromkeys(("heads", "timing", "curvature", "unit_tests", "study"), "finished")
    found = {path.stem: json.loads(path.read_text())["result"] for path in tmp_path.glob("*.json")}
    assert set(found) == set(states)
    (row,) = found["heads"]["rows"]
    assert all(row[f"{name}_ms"] > 0 for name in ("dense", "soft", "auto", "all", "mask_loop"))
    assert all(any("p50" in key for key in found["timing"][head]["metrics"]) for head in ("dense", "soft", "sparse"))
    ours, theirs = (found["curvature"][library]["rounds"][0] for library in ("moe_heads", "pyhessian"))
    assert ours["lambda_max"] == pytest.approx(theirs["lambda_max"], rel=0.05)
    assert all("plain/test/accuracy" in found["study"][head]["metrics"] for head in ("dense", "soft", "sparse"))
    section = (tmp_path / "section.md").read_text()
    assert section.startswith("## On a GPU") and section.count("### ") >= 4


def quick(gpu: Any, out: Path, *more: str) -> dict[str, str]:
    return gpu.main(["--device", "cpu", "--quick", "--out", str(out), "--only", "heads", *more])


def test_a_further_call_continues_and_skips_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with benchmark_script("gpu", monkeypatch) as gpu:
        assert quick(gpu, tmp_path, "--minutes", "0") == {"heads": "cut off, run again to continue"}
        assert not json.loads((tmp_path / "heads.json").read_text())["result"]["rows"]
        assert quick(gpu, tmp_path) == {"heads": "finished"}
        assert quick(gpu, tmp_path) == {"heads": "finished earlier"}


def test_a_failed_piece_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> bool:
        raise RuntimeError("out of memory")

    def lack(*_: Any) -> bool:
        raise ImportError("no such package")

    with benchmark_script("gpu", monkeypatch) as gpu:
        monkeypatch.setattr(gpu, "PIECES", {"timing": (fail, 0.5), "study": (lack, 0.5), "heads": (gpu.heads, 1.0)})
        states = gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path), "--only", "timing", "study", "heads"])
    assert states == {"timing": "error", "study": "skipped", "heads": "finished"}
    section = (tmp_path / "section.md").read_text()
    assert "RuntimeError: out of memory" in section and "skipped: no such package" in section


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")
def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with benchmark_script("gpu", monkeypatch) as gpu, pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    assert "CUDA is not available on this machine" in capsys.readouterr().err

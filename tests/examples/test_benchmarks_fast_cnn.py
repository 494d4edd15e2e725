"""Ablation of the fast backbone at small size: every variant trains and has the change that its name states."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support.benchmark_scripts import benchmark_script
from tests.support.sources import ROOT


def write_images(folder: Path) -> Path:
    for split, count in (("train", 12), ("test", 2)):
        for name in ("cat", "dog"):
            images = folder / split / name
            images.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (12, 12, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(images / f"{number}.jpg")
    return folder


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_every_variant_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_images(tmp_path / "images")
    out = tmp_path / "out.json"
    with benchmark_script("fast_cnn", monkeypatch) as script:
        report = script.main(["--images", str(images), "--epochs", "1", "--seeds", "1", "--out", str(out)])
        assert set(report["variants"]) == set(script.VARIANTS)
    assert all(0 <= row["accuracy"] <= 1 and row["images_per_s"] > 0 for row in report["variants"].values())
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))


@pytest.mark.slow
def test_seeds_at_the_same_time_find_what_they_find_one_after_the_other(tmp_path: Path) -> None:
    images, found = write_images(tmp_path / "images"), []
    how = ["--images", str(images), "--epochs", "1", "--seeds", "3", "--only", "preset", "GELU"]
    for jobs in ("1", "2"):
        out = tmp_path / f"{jobs}.json"
        script = ROOT / "examples" / "benchmarks" / "fast_cnn.py"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script), *how, "--jobs", jobs, "--out", str(out)]
        subprocess.run(command, check=True, capture_output=True, env=environment)
        rows = json.loads(out.read_text())["variants"]
        found.append({name: row["accuracies"] for name, row in rows.items()})
    assert found[0] == found[1]
    assert {name: len(accuracies) for name, accuracies in found[1].items()} == {"preset": 3, "GELU": 3}

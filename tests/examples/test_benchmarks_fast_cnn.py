"""The ablation of the fast backbone, tiny: every variant trains, and is the variant that its name says."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support.benchmark_scripts import benchmark_script


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_every_variant_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in (("train", 12), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (12, 12, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.jpg")
    out = tmp_path / "out.json"
    with benchmark_script("fast_cnn", monkeypatch) as script:
        report = script.main(["--images", str(tmp_path / "images"), "--epochs", "1", "--seeds", "1", "--out", str(out)])
        assert set(report["variants"]) == set(script.VARIANTS)
    assert all(0 <= row["accuracy"] <= 1 and row["images_per_s"] > 0 for row in report["variants"].values())
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))

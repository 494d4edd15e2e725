"""Benchmark of the loss landscape at small size, without other libraries."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.support.benchmark_scripts import benchmark_script

Main = Callable[[Sequence[str]], dict[str, Any]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Main]:
    """The script's main function; the other libraries are hidden."""
    for name in ("loss_landscapes", "landscaper"):
        monkeypatch.setitem(sys.modules, name, None)
    with benchmark_script("loss_landscape", monkeypatch) as script:
        yield script.main


def test_it_measures_ratios_memory_and_what_is_left_behind(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(24):
        folder = tmp_path / "images" / "train" / f"class{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    sizes = ["--samples", "8", "--side", "3", "--head-side", "3", "--rounds", "1", "--steps", "1"]
    out = tmp_path / "out.json"
    main(["--images", str(tmp_path / "images"), "--out", str(out), "--net", "resnet8", "--heads", "sparse", *sizes])
    row = json.loads(out.read_text())["heads"]["sparse"]
    assert row["over_bare"].keys() == {"bare", "ours", "ours_without_fixed_routing"}
    assert row["center_error"] == {"ours": 0}
    assert set(row["restored"].values()) == {True}
    assert row["head_only_saves"] > 0
    assert row["peak_copies_of_the_parameters_beside_directions"] > 0
    assert "times the bare forward passes" in capsys.readouterr().out

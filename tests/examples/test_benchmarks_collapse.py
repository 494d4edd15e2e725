"""Benchmark of collapse at small size: cells, continued files and the table."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from moe_heads import SparseMoE, capacity
from tests.examples.test_benchmarks_fast_cnn import write_images
from tests.support.benchmark_scripts import benchmark_script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with benchmark_script("collapse", monkeypatch) as module:
        yield module


@pytest.mark.parametrize("name", ["DIGITS", "CIFAR"])
def test_every_cell_has_the_parameters_of_its_dense_head(script: ModuleType, name: str) -> None:
    cells = getattr(script, name)
    for label, cell in cells.items():
        total = capacity(script.build(cells[cell.reference])).total
        head = script.build(cell)
        assert abs(capacity(head).total - total) <= 0.05 * total, label
        if cell.gate_std is not None:
            gate = head.get_submodule("router.gate")
            assert isinstance(gate, nn.Linear) and float(gate.weight.detach().std()) < 2 * cell.gate_std


def test_the_default_cells_are_the_default_head(script: ModuleType) -> None:
    for k in (1, 2):
        head = script.build(script.CIFAR[f"k = {k}, default"])
        same = SparseMoE(64, 10, expert_width=head.expert_width, k=k)
        assert repr(head) == repr(same)


def test_shifts_are_those_of_the_demo(script: ModuleType) -> None:
    moved, (plain, labels) = script.shifted(), script.images("train")
    assert moved.shape == (9, len(labels), 1, 8, 8)
    torch.testing.assert_close(moved[4], plain)
    torch.testing.assert_close(moved[0][..., 1:, 1:], plain[..., :-1, :-1])


def test_a_file_is_continued_and_the_table_has_paired_differences(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, int]] = []

    def train(cell: object, seed: int) -> dict[str, float]:
        name = next(name for name, other in script.DIGITS.items() if other == cell)
        asked.append((name, seed))
        accuracy = 98.0 + seed if name == "dense" else 97.0 + seed
        return {"accuracy": accuracy} | ({} if name == "dense" else {"least": 0.004 + 0.1 * seed, "entropy": 1.5})

    monkeypatch.setattr(script, "train", train)
    out = tmp_path / "out.json"
    script.main(["--seeds", "1", "--only", "k = 2, paper's gate", "--out", str(out)])
    script.main(["--seeds", "3", "--only", "k = 2, paper's gate", "--out", str(out)])
    assert sorted(asked) == [(name, seed) for name in ("dense", "k = 2, paper's gate") for seed in range(3)]
    assert set(json.loads(out.read_text())["cells"]["dense"]["runs"]) == {"0", "1", "2"}
    printed = capsys.readouterr().out.splitlines()[-1]
    assert "| k = 2, paper's gate | 98.00 ± 0.58 | -1.00 ± 0.00 | 1 / 3 of 3 | 0.00, 0.10 | 1.50 |" in printed


def test_a_short_training_learns(script: ModuleType) -> None:
    found = script.train(script.Cell(head={"k": 2}, epochs=5), seed=0)
    assert found["accuracy"] > 50 and 0 <= found["least"] <= 1 <= found["most"]


def test_a_short_training_on_images_continues_its_file(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    how = ["--images", str(write_images(tmp_path / "images")), "--epochs", "1", "--seeds", "1", "--out", str(out)]
    report = script.main([*how, "--only", "k = 1, default"])
    assert set(report["cells"]) == {"dense", "k = 1, default"}
    assert 0 <= report["cells"]["k = 1, default"]["runs"]["0"]["least"] <= 1
    assert script.main([*how, "--only", "k = 1, default"])["cells"] == report["cells"]
    assert "folder" not in out.read_text()

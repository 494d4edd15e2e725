"""Benchmark of collapse at small size: cells, continued files and the table."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from moe_heads import SparseMoE, capacity
from tests.support.benchmark_scripts import benchmark_script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with benchmark_script("collapse", monkeypatch) as module:
        yield module


def test_every_cell_has_the_parameters_of_the_dense_head(script: ModuleType) -> None:
    total = capacity(script.build(script.CELLS["dense"])).total
    for name, cell in script.CELLS.items():
        head = script.build(cell)
        assert abs(capacity(head).total - total) <= 0.05 * total, name
        if cell.gate_std is not None:
            assert isinstance(head, SparseMoE)
            gate = head.router.get_submodule("gate")
            assert isinstance(gate, nn.Linear) and float(gate.weight.detach().std()) < 2 * cell.gate_std


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
        name = next(name for name, other in script.CELLS.items() if other is cell)
        asked.append((name, seed))
        accuracy = 98.0 + seed if name == "dense" else 97.0 + seed
        return {"accuracy": accuracy} | ({} if name == "dense" else {"least": 0.004 + 0.1 * seed})

    monkeypatch.setattr(script, "train", train)
    out = tmp_path / "out.json"
    script.main(["--seeds", "1", "--only", "k = 2, default", "--out", str(out)])
    script.main(["--seeds", "3", "--only", "k = 2, default", "--out", str(out)])
    assert sorted(asked) == [(name, seed) for name in ("dense", "k = 2, default") for seed in range(3)]
    assert set(json.loads(out.read_text())["cells"]["dense"]["runs"]) == {"0", "1", "2"}
    printed = capsys.readouterr().out.splitlines()[-1]
    assert "| k = 2, default | 98.00 ± 0.58 | -1.00 ± 0.00 | 1 / 3 of 3 | 0.00, 0.10 |" in printed


def test_a_short_training_learns(script: ModuleType) -> None:
    found = script.train(script.Cell(head={"k": 2}, epochs=5), seed=0)
    assert found["accuracy"] > 50 and 0 <= found["least"] <= 1 <= found["most"]

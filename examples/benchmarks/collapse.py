"""Benchmark of collapse: accuracy and use of the experts of sparse heads on the digits, by gate and balance loss.

Trains the small CNN of `make demo` with each head, with the settings of the demo (15 epochs of batches of 64, SGD with
learning rate 0.1), in a plain loop. All heads have the total parameters of the dense head. Each cell changes something
of the default. "dead" is an expert below 1 % of the fair share of the test images, "starved" one below 25 %. Runs that
the file already has are not repeated.

    python examples/benchmarks/collapse.py --seeds 10 --out collapse.json
    python examples/benchmarks/collapse.py --seeds 40 --only finalists --jobs 2 --out collapse.json
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from bench.timing import machine
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads import Dense, Head, SparseMoE, capacity, match_capacity
from moe_heads.capacity import HeadKind
from moe_heads.lightning_modules import DigitsCNN, DigitsDataModule, LabeledImages

_DEAD, _STARVED = 0.01, 0.25


@dataclass(frozen=True)
class Cell:
    """A head and its training; the defaults are those of the demo.

    Attributes:
        kind: "dense", "soft" or "sparse".
        head: Options of the head.
        learning_rate: Learning rate of the network.
        gate_factor: Factor of the gate's learning rate.
        gate_std: Standard deviation of the gate's first weights, with a bias of zero; None for those of `nn.Linear`.
        gate_decay: Whether the gate has weight decay.
        epochs: Number of epochs.
    """

    kind: HeadKind = "sparse"
    head: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 0.1
    gate_factor: float = 1.0
    gate_std: float | None = None
    gate_decay: bool = True
    epochs: int = 15


def _sparse(k: int, **options: Any) -> Cell:
    own = {name: options.pop(name) for name in list(options) if name in Cell.__dataclass_fields__}
    return Cell(head={"k": k, **options}, **own)


def _cells() -> dict[str, Cell]:
    found = {"dense": Cell("dense"), "soft": Cell("soft")}
    switch, both = {"switch": 0.1}, {"importance": 0.05, "load": 0.05}
    for k in (2, 1):
        one_factor: dict[str, Cell] = {
            "default": _sparse(k),
            "both losses 1.0": _sparse(k, balance={"importance": 1.0, "load": 1.0}),
            "both losses 0.05": _sparse(k, balance=both),
            "no noise, switch 0.1": _sparse(k, noisy=False, balance=switch),
            "z-loss 0.001": _sparse(k, balance={"importance": 0.2, "load": 0.2, "z": 0.001}),
            "normalized": _sparse(k, normalize=True),
            "gate starts small": _sparse(k, gate_std=1e-3),
            "gate learns ten times slower": _sparse(k, gate_factor=0.1),
            "gate learns three times faster": _sparse(k, gate_factor=3.0),
            "gate without weight decay": _sparse(k, gate_decay=False),
            "learning rate 0.05": _sparse(k, learning_rate=0.05),
            "45 epochs": _sparse(k, epochs=45),
            "16 experts": _sparse(k, num_experts=16),
            "shared expert": _sparse(k, num_shared_experts=1),
            "normalized, small, both losses 0.05": _sparse(k, normalize=True, gate_std=1e-3, balance=both),
            "normalized, small, no noise, switch 0.1": _sparse(
                k, normalize=True, gate_std=1e-3, noisy=False, balance=switch
            ),
        }
        shared: dict[str, Any] = {"num_shared_experts": 1, "noisy": False}
        finalists = {
            "finalist: shared expert, no noise, switch 0.1": _sparse(k, **shared, balance=switch),
            "finalist: the same, normalized": _sparse(k, **shared, balance=switch, normalize=True),
            **{
                f"finalist: the same, normalized, switch {size}": _sparse(
                    k, **shared, balance={"switch": size}, normalize=True
                )
                for size in (0.03, 0.05)
            },
        }
        found |= {f"k = {k}, {name}": cell for name, cell in (one_factor | finalists).items()}
    return found


CELLS = _cells()


@cache
def images(split: str) -> tuple[Tensor, Tensor]:
    """Return the normalized images (N, 1, 8, 8) and labels (N,) of a split."""
    data = DigitsDataModule()
    data.prepare_data()
    data.setup()
    part = data.analysis_dataset("train" if split == "train" else "test")
    assert isinstance(part, LabeledImages)
    return part.transform(part.images[torch.arange(len(part))]), part.labels


@cache
def shifted(black: float = -0.3053 / 0.3760) -> Tensor:
    """Return the training images with all shifts by up to one pixel, (9, N, 1, 8, 8), of which the demo draws one."""
    padded = F.pad(images("train")[0], (1, 1, 1, 1), value=black)
    return torch.stack([padded[:, :, row : row + 8, column : column + 8] for row in range(3) for column in range(3)])


def build(cell: Cell) -> Head:
    """Build the head of a cell with the total parameters of the dense head."""
    dense = Dense(64, 10, width=128)
    if cell.kind == "dense":
        return dense
    head = match_capacity(cell.kind, 64, 10, total=capacity(dense).total, tolerance=0.05, **cell.head)
    if cell.gate_std is not None and isinstance(head, SparseMoE):
        gate = head.router.get_submodule("gate")
        assert isinstance(gate, nn.Linear)
        nn.init.normal_(gate.weight, std=cell.gate_std)
        nn.init.zeros_(gate.bias)
    return head


def train(cell: Cell, seed: int) -> dict[str, float]:
    """Train a head, and return its accuracy on the test images in % and the use of its experts in fair shares."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    backbone = DigitsCNN()
    head = build(cell)
    model = nn.Sequential(backbone, head)
    routed = {id(p) for name, p in head.named_parameters() if name.startswith("router.")}
    rest = [p for p in model.parameters() if id(p) not in routed]
    gate = [p for p in model.parameters() if id(p) in routed]
    groups = [{"params": rest, "lr": cell.learning_rate, "weight_decay": 5e-4}]
    if gate:
        rate = cell.learning_rate * cell.gate_factor
        groups.append({"params": gate, "lr": rate, "weight_decay": 5e-4 if cell.gate_decay else 0.0})
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=cell.epochs)
    generator, labels, moved = torch.Generator().manual_seed(seed), images("train")[1], shifted()
    for _ in range(cell.epochs):
        model.train()
        for rows in torch.randperm(len(labels), generator=generator).split(64):
            shifts = torch.randint(len(moved), (len(rows),), generator=generator)
            output = head(backbone(moved[shifts, rows]), return_routing=True)
            optimizer.zero_grad()
            (F.cross_entropy(output.logits, labels[rows]) + output.aux_loss).backward()
            optimizer.step()
        schedule.step()
    model.eval()
    x, y = images("test")
    with torch.no_grad():
        output = head(backbone(x), return_routing=True)
    found = {"accuracy": 100 * float((output.logits.argmax(-1) == y).float().mean())}
    if output.routing is not None:
        stats = output.routing.stats()
        share = (stats.importance if output.routing.soft else stats.load).double() * len(stats.load)
        found |= {"least": float(share.min()), "most": float(share.max()), "entropy": float(stats.entropy)}
    return found


def row(cell: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """Write a line of the table: accuracy, difference from the dense head of the same seed, and use of the experts."""
    runs = cell["runs"]
    accuracy = [run["accuracy"] for run in runs.values()]
    text = f"{statistics.mean(accuracy):.2f} ± {_stderr(accuracy):.2f}"
    paired = [run["accuracy"] - dense["runs"][seed]["accuracy"] for seed, run in runs.items() if seed in dense["runs"]]
    text += f" | {statistics.mean(paired):+.2f} ± {_stderr(paired):.2f}" if paired else " | "
    least = [run["least"] for run in runs.values() if "least" in run]
    if not least:
        return f"{text} | | |"
    dead, starved = (sum(share < limit for share in least) for limit in (_DEAD, _STARVED))
    return f"{text} | {dead} / {starved} of {len(least)} | {min(least):.2f}, {statistics.median(least):.2f} |"


def _stderr(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _run(job: tuple[str, int]) -> tuple[str, int, dict[str, float]]:
    name, seed = job
    return name, seed, train(CELLS[name], seed)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the missing cells, write the JSON after each run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of the cells; dense is always run")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, or to continue")
    options = parser.parse_args(arguments)
    names = [
        name for name in CELLS if name == "dense" or not options.only or any(part in name for part in options.only)
    ]
    report: dict[str, Any] = {"machine": machine(), "cells": {}}
    if options.out.exists():
        report["cells"] = json.loads(options.out.read_text())["cells"]
    cells = report["cells"]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    jobs = [(name, seed) for name in names for seed in seeds if str(seed) not in cells.get(name, {"runs": {}})["runs"]]
    with ProcessPoolExecutor(options.jobs) as pool:
        for name, seed, found in pool.map(_run, jobs) if options.jobs > 1 else map(_run, jobs):
            cell = cells.setdefault(name, {"options": asdict(CELLS[name]), "runs": {}})
            cell["runs"][str(seed)] = {**found, "capability": torch.backends.cpu.get_cpu_capability()}
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    print("| head | test accuracy, % | minus dense | dead / starved, runs | least used: worst, median |")
    print("|---|---|---|---|---|")
    for name in [name for name in CELLS if name in cells]:
        print(f"| {name} | {row(cells[name], cells['dense'])}")
    return report


if __name__ == "__main__":
    main()

"""Benchmark of collapse: accuracy and use of the experts of sparse heads, by gate, balance loss and shared experts.

On the digits, each head is trained on the small CNN of `make demo` with the settings of the demo (15 epochs of batches
of 64, SGD with learning rate 0.1), in a plain loop. With ``--images``, heads are trained on FastCNN with CIFAR-10
images, with the preset `cpu` of the study and fewer epochs. All heads have the total parameters of the dense head.
"dead" is an expert below 1 % of the fair share of the test images, "starved" one below 25 %. Runs that the file already
has are not repeated.

    python examples/benchmarks/collapse.py --seeds 10 --jobs 2 --out collapse.json
    python examples/benchmarks/collapse.py --seeds 40 --only finalist --jobs 2 --out collapse.json
    python examples/benchmarks/collapse.py --images FOLDER --epochs 3 --seeds 3 --jobs 2 --out collapse_cifar.json
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from bench.collapse_cells import CIFAR, DIGITS, Cell, build
from bench.fitting import fit
from bench.timing import machine
from lightning import pytorch as pl
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from study.build import build_data, build_model
from study.options import Options
from study.presets import PRESETS

from moe_heads import Head, HeadOutput
from moe_heads.lightning_modules import DigitsCNN, DigitsDataModule, LabeledImages

_DEAD, _STARVED = 0.01, 0.25


@cache
def images(split: str) -> tuple[Tensor, Tensor]:
    """Return the normalized digits (N, 1, 8, 8) and labels (N,) of a split."""
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


def train(cell: Cell, seed: int) -> dict[str, float]:
    """Train a head on the digits; return its accuracy on the test images and the use of its experts."""
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
        return measured(head(backbone(x), return_routing=True), y)


def train_on_cifar(cell: Cell, seed: int, folder: str, epochs: int, limit_train: int | None) -> dict[str, float]:
    """Train a head on FastCNN; return its accuracy on the test images and the use of its experts."""
    torch.set_num_threads(1)
    pl.seed_everything(seed, verbose=False)
    protocol = replace(PRESETS["cpu"], data=f"imagefolder:{folder}", epochs=epochs)
    options = Options(preset="cpu", out=Path("runs"), limit_train=limit_train, **vars(protocol))
    data = build_data(options)
    model = build_model(options, "dense", data)
    assert isinstance(model.head, Head)
    model.head = build(cell, model.head.in_features, data.num_classes)
    fit(options, model, data)
    model.eval()
    part = data.analysis_dataset("test")
    assert isinstance(part, LabeledImages)
    with torch.no_grad():
        batches = [part.transform(part.images[rows]) for rows in torch.arange(len(part)).split(500)]
        features = torch.cat([model.backbone(x) for x in batches])
        return measured(model.head(features, return_routing=True), part.labels)


def measured(output: HeadOutput, labels: Tensor) -> dict[str, float]:
    """Return the accuracy in %, and the use of the experts in fair shares."""
    found = {"accuracy": 100 * float((output.logits.argmax(-1) == labels).float().mean())}
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
        return f"{text} | | | |"
    entropy = statistics.mean(run["entropy"] for run in runs.values())
    dead, starved = (sum(share < limit for share in least) for limit in (_DEAD, _STARVED))
    use = f"{dead} / {starved} of {len(least)} | {min(least):.2f}, {statistics.median(least):.2f}"
    return f"{text} | {use} | {entropy:.2f} |"


def _stderr(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _run(job: tuple[str, int], cells: Mapping[str, Cell], how: Mapping[str, Any]) -> tuple[str, int, dict[str, float]]:
    name, seed = job
    return name, seed, train_on_cifar(cells[name], seed, **how) if how else train(cells[name], seed)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the missing cells, write the JSON after each run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of the cells")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--images", default=None, help="folder with train/<class>/ and test/<class>/ for CIFAR-10")
    parser.add_argument("--epochs", type=int, default=3, help="epochs on CIFAR-10")
    parser.add_argument("--limit-train", type=int, default=None, help="number of training images of CIFAR-10 to use")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, or to continue")
    options = parser.parse_args(arguments)
    known = DIGITS if options.images is None else CIFAR
    how: dict[str, Any] = {}
    if options.images is not None:
        how = {"folder": options.images, "epochs": options.epochs, "limit_train": options.limit_train}
    chosen = [name for name in known if not options.only or any(part in name for part in options.only)]
    names = [name for name in known if name in chosen or name in {known[other].reference for other in chosen}]
    described = {name: value for name, value in how.items() if name != "folder"}
    report: dict[str, Any] = {"machine": machine(), **described, "cells": {}}
    if options.out.exists():
        report["cells"] = json.loads(options.out.read_text())["cells"]
    cells = report["cells"]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    jobs = [(name, seed) for seed in seeds for name in names if str(seed) not in cells.get(name, {"runs": {}})["runs"]]
    run, place = partial(_run, cells=known, how=how), machine()["processor"]
    with ProcessPoolExecutor(options.jobs) as pool:
        for name, seed, found in pool.map(run, jobs) if options.jobs > 1 else map(run, jobs):
            cell = cells.setdefault(name, {"options": asdict(known[name]), "runs": {}})
            capability = torch.backends.cpu.get_cpu_capability()
            cell["runs"][str(seed)] = {**found, "capability": capability, "processor": place}
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(
        "| head | test accuracy, % | minus dense | dead / starved, runs | least used: worst, median | entropy, nats |"
    )
    print("|---|---|---|---|---|---|")
    for name in [name for name in known if name in cells]:
        print(f"| {name} | {row(cells[name], cells[known[name].reference])}")
    return report


if __name__ == "__main__":
    main()

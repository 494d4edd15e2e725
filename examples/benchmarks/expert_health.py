"""Benchmark of the checks for inert experts: norms of healthy and broken experts, accuracy, and time.

"norms" trains heads on the digits as `collapse.py` does, and prints the smallest norm of an expert that is not dead, in
units of the median. In broken heads the second layer of expert 0 is zero in every step, or expert 0 has an extra weight
decay. "accuracy" compares the largest singular value with that of `torch.linalg.svdvals`. "cost" times the end of an
epoch and the analysis of 1,024 rows against a training step of one layer with 1,024 rows (forward, backward, SGD).
Parts that do not run keep their numbers in the file.

    python examples/benchmarks/expert_health.py --out expert_health.json
    python examples/benchmarks/expert_health.py --only accuracy cost
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench.collapse_cells import DIGITS, build
from bench.timing import machine, time_interleaved
from collapse import images, shifted
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads import Head, MoELayer
from moe_heads.analysis import expert_utilization
from moe_heads.analysis.expert_utilization.expert_weights import ExpertWeights, find_experts
from moe_heads.analysis.expert_utilization.weight_health import measure_weights
from moe_heads.experts import Experts
from moe_heads.lightning_modules import DigitsCNN

_DEFAULT = "k = 2, finalist: two shared experts, normalized, switch 0.1 (default)"
HEALTHY = (
    _DEFAULT,
    "k = 1, finalist: two shared experts, normalized, switch 0.1 (default)",
    "k = 2, paper's gate",
    "k = 1, paper's gate",
    "k = 2, default, 16 experts",
    "k = 1, default, 16 experts",
    "k = 2, bias-balanced",
    "soft",
)


def _scale(experts: Experts, factor: float, first: bool = True) -> None:
    with torch.no_grad():
        for layer in (experts.fc1, experts.fc2) if first else (experts.fc2,):
            layer.weight[0] *= factor
            layer.bias_by_expert[0] *= factor


BROKEN: dict[str, Callable[[Experts, float], None]] = {
    "second layer of expert 0 zero": lambda experts, rate: _scale(experts, 0.0, first=False),
    "expert 0 with weight decay 0.03": lambda experts, rate: _scale(experts, 1 - 0.03 * rate),
    "expert 0 with weight decay 0.1": lambda experts, rate: _scale(experts, 1 - 0.1 * rate),
    "expert 0 with weight decay 0.3": lambda experts, rate: _scale(experts, 1 - 0.3 * rate),
    "expert 0 with weight decay 1": lambda experts, rate: _scale(experts, 1 - 1.0 * rate),
}

# (experts, features, expert width) of the layers that are timed.
LAYERS = ((8, 64, 64), (8, 512, 64), (8, 256, 1024), (64, 256, 256), (128, 512, 256))

MATRICES = ((65, 65), (128, 512), (512, 512), (768, 2048), (2048, 2048))


def trained(name: str, seed: int, after_step: Callable[[Experts, float], None] | None, epochs: int) -> nn.Module:
    """Train a head on the digits, and return backbone and head.

    Args:
        name: Cell of the benchmark of collapse.
        seed: Seed of the weights and of the order of the data.
        after_step: Changes the experts after each optimizer step, given the learning rate.
        epochs: Number of epochs.
    """
    torch.manual_seed(seed)
    head = build(DIGITS[name])
    assert isinstance(head, Head) and isinstance(head.experts, Experts)
    model = nn.Sequential(DigitsCNN(), head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    generator, labels, moved = torch.Generator().manual_seed(seed), images("train")[1], shifted()
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(labels), generator=generator).split(64):
            shifts = torch.randint(len(moved), (len(rows),), generator=generator)
            output = head(model[0](moved[shifts, rows]), return_routing=True)
            optimizer.zero_grad()
            (F.cross_entropy(output.logits, labels[rows]) + output.aux_loss).backward()
            optimizer.step()
            if after_step is not None:
                after_step(head.experts, float(schedule.get_last_lr()[0]))
        schedule.step()
    return model


def norms_of(model: nn.Module) -> dict[str, Any]:
    """Return the smallest norms of the experts that are not dead, and those of expert 0, on the test images."""
    (head,) = expert_utilization(model, [images("test")], num_permutations=0).heads.values()
    kept = [expert for expert in range(len(head.load)) if expert not in head.dead_experts]
    found: dict[str, Any] = {"num_dead": len(head.dead_experts), "load_of_expert_0": float(head.relative_load[0])}
    for name in ("output_norms", "weight_norms", "stable_ranks"):
        values = getattr(head, name)
        found |= {f"{name}_min": float(values[kept].min()), f"{name}_of_expert_0": float(values[0])}
    return found


def norms(seeds: int, epochs: int) -> dict[str, list[dict[str, Any]]]:
    """Measure the norms of trained heads, by head or by what was broken."""
    cases: dict[str, tuple[str, Callable[[Experts, float], None] | None]] = {name: (name, None) for name in HEALTHY}
    cases |= {f"broken: {broken}": (_DEFAULT, after) for broken, after in BROKEN.items()}
    report: dict[str, list[dict[str, Any]]] = {}
    for case, (name, after_step) in cases.items():
        runs = report[case] = [norms_of(trained(name, seed, after_step, epochs)) for seed in range(seeds)]
        shown = [f"{key} {min(run[key] for run in runs):.3f}" for key in ("output_norms_min", "weight_norms_min")]
        of_0 = [
            f"{key} {min(run[key] for run in runs):.3f} to {max(run[key] for run in runs):.3f}"
            for key in ("output_norms_of_expert_0", "weight_norms_of_expert_0", "load_of_expert_0")
        ]
        print(f"{case}: {', '.join(of_0 if after_step else shown)}", flush=True)
    return report


def accuracy() -> dict[str, float]:
    """Return the relative error of the stable rank, which has twice that of the singular value, by matrix."""
    kinds: dict[str, Callable[[int, int], Tensor]] = {
        "gaussian": torch.randn,
        "uniform": lambda m, n: 2 * torch.rand(m, n) - 1,
        "rank 5": lambda m, n: torch.randn(m, 5) @ torch.randn(5, n),
        "gaussian plus rank 1": lambda m, n: (
            torch.randn(m, n) + 1.5 * torch.randn(m, 1) @ torch.randn(1, n) / (m * n) ** 0.25
        ),
    }
    report = {}
    for size in MATRICES:
        for kind, draw in kinds.items():
            matrix = draw(*size)
            health = measure_weights(ExpertWeights(nn.Identity(), (), {"weight": matrix.unsqueeze(0)}))
            exact = matrix.double().norm().square() / torch.linalg.svdvals(matrix.double())[0].square()
            error = report[f"{kind}, {size[0]} x {size[1]}"] = float(health.stable_ranks) / float(exact) - 1
            print(f"stable rank, {kind}, {size}: {error:+.1e}", flush=True)
    return report


def cost(rounds: int) -> dict[str, dict[str, float]]:
    """Return the smallest CPU milliseconds of a training step of a layer, the end of an epoch, and the analysis."""
    report = {}
    for num_experts, features, width in LAYERS:
        layer = MoELayer(features, num_experts=num_experts, expert_width=width, num_shared_experts=0)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
        x = torch.randn(1024, features)

        def step(layer: nn.Module = layer, x: Tensor = x, optimizer: torch.optim.Optimizer = optimizer) -> None:
            layer.train()
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()

        def weights(layer: MoELayer = layer, num_experts: int = num_experts) -> None:
            measure_weights(find_experts(layer, layer.router, num_experts))

        def analysis(layer: nn.Module = layer, x: Tensor = x) -> None:
            expert_utilization(layer, [(x,)], num_permutations=0)

        candidates: dict[str, Callable[[], object]] = {
            "training_step": step,
            "end_of_epoch": weights,
            "whole_analysis": analysis,
        }
        row = time_interleaved(candidates, rounds=rounds, loaded=True)
        report[f"{num_experts} experts, {features} features, width {width}"] = row
        print(
            f"{num_experts} experts of {features} x {width}: "
            + ", ".join(f"{name} {ms:.1f} ms" for name, ms in row.items()),
            flush=True,
        )
    return report


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print the numbers and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["norms", "accuracy", "cost"]
    parser.add_argument("--only", nargs="+", default=parts, choices=parts)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each head")
    parser.add_argument("--epochs", type=int, default=15, help="epochs of each run")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the timing")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    known = json.loads(options.out.read_text()) if options.out is not None and options.out.exists() else {}
    report: dict[str, Any] = {**known}
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "norms": lambda: norms(options.seeds, options.epochs),
        "accuracy": accuracy,
        "cost": lambda: cost(options.rounds),
    }
    for part in parts:
        if part in options.only:
            report[part] = {"machine": machine(), "results": run[part]()}
            if options.out is not None:
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()

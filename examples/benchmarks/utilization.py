"""Overhead of ExpertUtilizationCallback in a training step.

Times a training step (forward, cross entropy, backward, SGD) with and without the callback's hooks. The two alternate
every few steps, so that changes of the machine's speed affect both. A pair consists of one epoch of each, including the
counting at the end of the epoch. CPU time, fp32, one thread. Reports median and quartiles of the ratios of the pairs.

    python examples/benchmarks/utilization.py --out utilization.json
    python examples/benchmarks/utilization.py --only head --compile
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench.timing import machine
from torch import Tensor, nn

from moe_heads import NOISY_TOP_K, SoftMoE, SparseMoE, collect_routing
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.expert_utilization.training import TrainingRouters
from moe_heads.lightning_modules import ResNet18Cifar

HEADS: dict[str, Callable[[], nn.Module]] = {
    "soft": lambda: SoftMoE(512, 10),
    "sparse": lambda: SparseMoE(512, 10, **NOISY_TOP_K),
}


class MixtralLogits(nn.Module):
    """Mixtral, four layers of eight experts, recognized without an adapter. Returns the logits of the last token."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import MixtralConfig, MixtralForCausalLM

        shape: dict[str, Any] = {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "vocab_size": 512,
        }
        self.model = MixtralForCausalLM(MixtralConfig(**shape, num_attention_heads=4, num_key_value_heads=2))

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits (B, V)."""
        logits: Tensor = self.model(input_ids=ids).logits
        return logits[:, -1]


_PARTS = ["head", "resnet18", "mixtral"]

# Steps before switching: the speed changes over seconds, and caches have to be warm within a turn.
_TURN = 8


def cases(only: Sequence[str]) -> dict[str, tuple[nn.Module, Tensor, int]]:
    """Return model, inputs and steps of an epoch for each case."""
    found: dict[str, tuple[nn.Module, Tensor, int]] = {}
    if "mixtral" in only:
        found["Mixtral, 4 layers, 8 × 64 tokens"] = MixtralLogits(), torch.randint(512, (8, 64)), 16
    for name, head in HEADS.items():
        if "head" in only:
            found[f"head alone, {name}, batch 256"] = head(), torch.randn(256, 512), 200
        if "resnet18" in only:
            model = nn.Sequential(ResNet18Cifar(), head())
            found[f"ResNet-18, {name}, batch 32"] = model, torch.randn(32, 3, 32, 32), 2
    return found


def measure(model: nn.Module, x: Tensor, steps: int, pairs: int, compiled: bool) -> dict[str, Any]:
    """Measure the CPU milliseconds of a step with and without the hooks."""
    y = torch.randint(10, (len(x),))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = torch.compile(model) if compiled else model
    times: dict[bool, list[float]] = {True: [], False: []}
    ends: list[float] = []

    def step(routers: TrainingRouters | None) -> None:
        if routers is not None:
            routers.begin_batch()
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(x), y).backward()
        if routers is not None:
            routers.note_gradients(optimizer)
        optimizer.step()
        if routers is not None:
            routers.end_training_batch()

    with collect_routing(model) as collection:
        routers = TrainingRouters(model, collection, None, 0.01, 0.25)  # one for the whole training
        for number in range(-1, pairs):  # the first pair is a warm-up
            spent = {True: 0.0, False: 0.0}
            for done in range(0, steps, _TURN):
                turn = min(_TURN, steps - done)
                for watched in random.sample([True, False], 2):
                    start = time.process_time()
                    for _ in range(turn):
                        step(routers if watched else None)
                    if watched and done + turn == steps:
                        before_end = time.process_time()
                        routers.end_epoch(Ranks())
                        ends.append(1e3 * (time.process_time() - before_end))
                    spent[watched] += time.process_time() - start
            if number >= 0:
                for watched, seconds in spent.items():
                    times[watched].append(1e3 * seconds / steps)
    ratios = [with_it / without for with_it, without in zip(times[True], times[False], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    # the hooks of the steps, without the end of an epoch, which an epoch of more steps spreads over more
    of_hooks = [r - end / steps / t for r, end, t in zip(ratios, ends[1:], times[False], strict=True)]
    return {
        "ms_without": statistics.median(times[False]),
        "ms_with": statistics.median(times[True]),
        "overhead": middle - 1,
        "quartiles": [low - 1, high - 1],
        "overhead_of_hooks": statistics.median(of_hooks) - 1,
        "ms_of_the_end": statistics.median(ends[1:]),
        "steps_of_an_epoch": steps,
        "pairs": pairs,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print the overheads and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=_PARTS, choices=_PARTS)
    parser.add_argument("--pairs", type=int, default=15, help="number of epochs with and without the hooks")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    report: dict[str, Any] = {"machine": machine(), "compiled": options.compile, "cases": {}}
    for name, (model, x, steps) in cases(options.only).items():
        row = report["cases"][name] = measure(model, x, steps, options.pairs, options.compile)
        low, high = row["quartiles"]
        print(
            f"{name}: {row['ms_without']:.2f} ms per step, {row['ms_with']:.2f} with the callback:"
            f" {row['overhead']:+.1%} (quartiles {low:+.1%} to {high:+.1%}), of it the hooks"
            f" {row['overhead_of_hooks']:+.1%}; end of an epoch {row['ms_of_the_end']:.0f} ms",
            flush=True,
        )
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()

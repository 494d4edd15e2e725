"""Compare the loss landscape with bare forward passes, loss-landscapes and Landscaper.

The paper's ResNet-18 with a head, briefly trained on images, in evaluation mode. fp32, one CPU thread, all candidates
in one process and in random order in each round, CPU time of the process. bench/landscape_peers.py describes FOLDER of
--peers.

    python examples/benchmarks/loss_landscape.py --images FOLDER --peers FOLDER --weights weights.pt --out result.json
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench.cifar_nets import HEADS, NETS, load_images, trained
from bench.landscape_peers import PEERS, Batch, versions
from bench.peak_memory import peak_memory
from bench.timing import machine
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.analysis import LossLandscapeResult, loss_landscape, normalized_random_direction

Row = dict[str, Any]

# Target ratios: an upper and a lower bound.
_MOST_BARE_PASSES, _LEAST_SAVED = 1.1, 20.0


def main(arguments: Sequence[str] | None = None) -> Row:
    """Measure each head, write the JSON after every one, and print the ratios."""
    parser, options = _options(arguments)
    if options.peers is not None:
        sys.path.append(str(options.peers))
    torch.set_num_threads(1)
    found, missing = versions()
    for peer, reason in missing.items():
        print(f"{peer} is not available: {reason}")
    try:
        images = load_images(options.images, options.train_images, options.seed)
    except ValueError as error:
        parser.error(str(error))
    names = ("net", "samples", "side", "head_side", "rounds", "steps", "train_images", "seed")
    shared = {name: getattr(options, name) for name in names}
    report: Row = {"machine": machine(), "versions": found, "options": shared, "heads": {}}
    for head in options.heads:
        model = trained(options.net, head, images, steps=options.steps, seed=options.seed, cache=options.weights)
        batch = images.batches(options.samples, options.samples)[0]
        report["heads"][head] = measured(model, batch, options.side, options.head_side, options.rounds, list(found))
        print("\n".join(_lines(head, report["heads"][head])), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def measured(model: nn.Module, batch: Batch, side: int, head_side: int, rounds: int, peers: Sequence[str]) -> Row:
    """Return CPU seconds of each candidate in each round, ratios, peak memory, and whether the weights are restored.

    Args:
        model: Backbone and head.
        batch: The samples.
        side: Points on each side of the plane of all parameters.
        head_side: Points on each side of the plane of the head alone.
        rounds: Number of repetitions.
        peers: Names of the available peers.
    """
    before = [(p, p.detach().clone(), p.requires_grad) for p in model.parameters()]
    candidates: dict[str, Callable[[], Tensor]] = {
        "bare": lambda: _bare(model, batch, side**2),
        "ours": lambda: plane(model, batch, side, None).losses,
        "ours_without_fixed_routing": lambda: plane(model, batch, side, None, fixed_routing=False).losses,
        "ours_head_only": lambda: plane(model, batch, head_side, ["1"]).losses,
        **{peer: lambda peer=peer: PEERS[peer](model, batch, side) for peer in peers},  # type: ignore[misc]
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    surfaces: dict[str, Tensor] = {}
    restored = dict.fromkeys(candidates, True)
    center = float(_bare(model, batch, 1))
    order = random.Random(0)
    for _ in range(rounds):
        for name, run in order.sample(list(candidates.items()), len(candidates)):
            start = time.process_time()
            surfaces[name] = run()
            seconds[name].append(time.process_time() - start)
            restored[name] &= all(torch.equal(p, old) and p.requires_grad == flag for p, old, flag in before)
            for p, old, flag in before:
                p.requires_grad_(flag).data.copy_(old)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    bare = median["bare"] / side**2
    return {
        "cpu_s": seconds,
        "passes": {name: median[name] / bare for name in candidates},
        "over_bare": {name: median[name] / median["bare"] for name in candidates if name != "ours_head_only"},
        "head_only_saves": bare * head_side**2 / median["ours_head_only"],
        "restored": restored,
        "center_error": {
            name: abs(float(surface[side // 2, side // 2]) - center)
            for name, surface in surfaces.items()
            if name in {"ours", *peers}
        },
        **_memory(model, batch),
    }


def plane(
    model: nn.Module, batch: Batch, side: int, params: Sequence[str] | None, **options: Any
) -> LossLandscapeResult:
    """Compute our filter-normalized random plane, including its directions."""
    first, second = (normalized_random_direction(model, seed, params=params) for seed in (0, 1))
    return loss_landscape(
        model, _loss, [batch], direction1=first, direction2=second, num_points=side, params=params, **options
    )


def _memory(model: nn.Module, batch: Batch) -> Row:
    """Return the peak memory of a plane above one forward pass, without the directions, in copies of the parameters."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    first, second = (normalized_random_direction(model, seed) for seed in (0, 1))
    small = tuple(part[:2] for part in batch)
    run = peak_memory(lambda: loss_landscape(model, _loss, [small], direction1=first, direction2=second, num_points=2))
    one = peak_memory(lambda: _bare(model, (small[0], small[1]), 1))
    return {"peak_copies_of_the_parameters_beside_directions": (run - one) / size}


def _bare(model: nn.Module, batch: Batch, number: int) -> Tensor:
    with torch.no_grad():
        return torch.stack([_loss(model, batch) for _ in range(number)]).double()[-1]


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _lines(head: str, row: Row) -> list[str]:
    over = row["over_bare"]
    lines = [f"\n{head}"]
    lines += [f"  {name:28} {over[name]:7.3f} times the bare forward passes" for name in over if name != "bare"]
    lines.append(f"  head-only plane: 1/{row['head_only_saves']:.0f} of the plane of all parameters")
    lines.append(f"  weights and requires_grad restored: {row['restored']}")
    lines.append(f"  error at the center: {row['center_error']}")
    lines.append(
        f"  peak memory without the directions: {row['peak_copies_of_the_parameters_beside_directions']:.2f} copies"
    )
    reached = over["ours"] <= _MOST_BARE_PASSES and row["head_only_saves"] >= _LEAST_SAVED
    lines.append(f"  targets ({_MOST_BARE_PASSES} and 1/{_LEAST_SAVED:.0f}): {'reached' if reached else 'missed'}")
    return lines


def _options(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with train/<class>/ image files")
    parser.add_argument("--peers", type=Path, default=None, help="folder with the other libraries")
    parser.add_argument("--weights", type=Path, default=None, help="cache file of the trained weights")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--net", choices=list(NETS), default="resnet18", help="backbone")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=["dense", "sparse"], help="heads")
    parser.add_argument("--samples", type=int, default=64, help="images of the loss")
    parser.add_argument("--side", type=int, default=5, help="points on each side of the plane of all parameters, odd")
    parser.add_argument("--head-side", type=int, default=15, help="points on each side of the head's plane")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions")
    parser.add_argument("--steps", type=int, default=40, help="training steps")
    parser.add_argument("--train-images", type=int, default=5000, help="number of training images")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    return parser, parser.parse_args(arguments)


if __name__ == "__main__":
    main()

"""Compare batched evaluation of a head's loss plane by torch.vmap with a loop over the points.

The head runs on features that are computed once, as in `loss_landscape(params=["head"])`, with the same points and the
same loss, without routing. The loop moves the weights in place. The batched version stacks them and calls the head
through torch.func. fp32, interleaved, medians of the wall-clock time, with the largest difference of a loss.

    python examples/benchmarks/landscape_vmap.py --threads 1 --out result.json
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench.timing import machine, time_interleaved
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads import Dense, SoftMoE, SparseMoE
from moe_heads.analysis import normalized_random_direction
from moe_heads.analysis.loss_landscape.directions import split_direction

Row = dict[str, Any]
Parts = dict[str, Tensor]
HEADS: dict[str, Callable[[int, int], nn.Module]] = {"dense": Dense, "soft": SoftMoE, "sparse": SparseMoE}


def main(arguments: Sequence[str] | None = None) -> Row:
    """Measure every head, sample size and chunk size, print the ratios, and write the JSON."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    report: Row = {"machine": machine(), "options": {k: v for k, v in vars(options).items() if k != "out"}, "rows": []}
    for name, make in HEADS.items():
        for samples in options.samples:
            torch.manual_seed(0)
            head = make(options.features, 10).eval().to(options.device)
            report["rows"].append(measured(head, samples, options) | {"head": name, "samples": samples})
            print(_line(report["rows"][-1]), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


@torch.no_grad()
def measured(head: nn.Module, samples: int, options: argparse.Namespace) -> Row:
    """Return the milliseconds of a plane by each method, and the largest relative difference from the loop's losses."""
    x = torch.randn(samples, options.features, device=options.device)
    y = torch.randint(10, (samples,), device=options.device)
    start = {name: p.clone() for name, p in head.named_parameters()}
    directions = [split_direction(head, normalized_random_direction(head, seed)) for seed in (0, 1)]
    side = torch.linspace(-1, 1, options.side, device=options.device)
    points = torch.cartesian_prod(side, side)
    ways: dict[str, Callable[[], Tensor]] = {"loop": partial(_loop, head, x, y, start, directions, points)}
    for chunk in options.chunks:
        ways[f"vmap_{chunk}"] = partial(_vmapped, head, x, y, start, directions, points, chunk)
    losses = {name: way() for name, way in ways.items()}
    difference = {
        name: float(((found - losses["loop"]) / losses["loop"]).abs().max()) for name, found in losses.items()
    }
    return {"ms": time_interleaved(ways, rounds=options.rounds), "largest_relative_difference": difference}


def _loop(head: nn.Module, x: Tensor, y: Tensor, start: Parts, directions: list[Parts], points: Tensor) -> Tensor:
    losses = []
    for alpha, beta in points.tolist():
        for name, p in head.named_parameters():
            torch.add(start[name], directions[0][name], alpha=alpha, out=p).add_(directions[1][name], alpha=beta)
        losses.append(float(F.cross_entropy(head(x), y)))
    for name, p in head.named_parameters():
        p.copy_(start[name])
    return torch.tensor(losses)


def _vmapped(
    head: nn.Module, x: Tensor, y: Tensor, start: Parts, directions: list[Parts], points: Tensor, chunk: int
) -> Tensor:
    def loss(point: Tensor) -> Tensor:
        first, second = directions
        moved = {name: start[name] + point[0] * first[name] + point[1] * second[name] for name in start}
        return F.cross_entropy(torch.func.functional_call(head, moved, (x,)), y)

    return torch.vmap(loss, chunk_size=chunk)(points).cpu()


def _line(row: Row) -> str:
    loop, difference = row["ms"]["loop"], row["largest_relative_difference"]
    ways = [f"{name} {ms / loop:.2f} ({difference[name]:.0e})" for name, ms in row["ms"].items() if name != "loop"]
    return f"{row['head']}, {row['samples']} samples: loop {loop:.1f} ms; relative to it: {', '.join(ways)}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[128, 1000], help="samples of the loss")
    parser.add_argument("--features", type=int, default=512, help="features of a sample")
    parser.add_argument("--side", type=int, default=15, help="points on each side of the plane")
    parser.add_argument("--chunks", type=int, nargs="+", default=[5, 25, 225], help="points in a batch")
    parser.add_argument("--rounds", type=int, default=7, help="repetitions")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="device of the head")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

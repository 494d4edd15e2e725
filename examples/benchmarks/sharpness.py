"""Compare the sharpness analysis with PyHessian, curvlinops with scipy, hessian-eigenthings and Landscaper.

Networks briefly trained on images and on text, in evaluation mode. fp32, one CPU thread, all candidates in one process
and interleaved. Measures CPU time of the process, Hessian-vector products over all samples, peak memory, and errors
against float64. bench/hessian_peers.py describes FOLDER of --peers and the use of each library, bench/hessian_report.py
the comparison, bench/hessian_oracle.py the reference.

    python examples/benchmarks/sharpness.py --images FOLDER --peers FOLDER --weights weights.pt --out sharpness.json
    python examples/benchmarks/sharpness.py ... --only resnet8 vit                   # or resnet8/dense, or
    python examples/benchmarks/sharpness.py ... --only resnet18/soft/curvlinops      # one candidate of one cell

Partial runs with the same options add their results to the same JSON file, each with its commit.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from bench.cifar_nets import HEADS, Images, load_images, trained
from bench.hessian_cell import SECTIONS, Cell
from bench.hessian_peers import DISTRIBUTIONS, versions
from bench.hessian_problem import Problem, Row
from bench.hessian_report import table
from bench.timing import machine
from bench.transformer_nets import TRANSFORMERS, text_batches, trained_transformer

# Options that partial runs of one file share.
SHARED_OPTIONS = ("samples", "batch", "steps", "train_images", "rounds", "seed", "graph_memory")


@dataclass(frozen=True)
class Size:
    """Size of the measurements of a network.

    Attributes:
        samples: Samples for the Hessian.
        batch: Samples in a batch.
        steps: Training steps.
        train_batch: Samples in a training step.
        reference: Lanczos steps and probes of the reference in float64.
    """

    samples: int
    batch: int
    steps: int
    train_batch: int
    reference: tuple[int, int]


SIZES = {
    "resnet8": Size(32, 8, 300, 128, (60, 20)),
    "resnet18": Size(8, 8, 150, 64, (40, 8)),
    "vit": Size(16, 4, 300, 32, (60, 20)),
    "gpt2": Size(16, 4, 500, 32, (60, 20)),
}
"""Sizes at which three of them take about ten minutes of a quiet core each or less. The ResNet-18 takes longer."""


def main(arguments: Sequence[str] | None = None) -> Row:
    """Run the selected sections, write the JSON after every measurement, and print a table for each cell."""
    parser, options = _options(arguments)
    if options.peers is not None:
        sys.path.append(str(options.peers))
    torch.set_num_threads(1)
    found, missing = versions()
    for peer, reason in missing.items():
        print(f"{peer} is not available: {reason}")
    try:
        report = _opened(options, found)
        images = load_images(options.images, options.train_images, options.seed)
        cells = _chosen(options.only)
    except ValueError as error:
        parser.error(str(error))
    start = time.perf_counter()
    for (net, head), sections in cells.items():
        samples, size = options.samples or SIZES[net].samples, options.batch or SIZES[net].batch
        if samples % size or samples > len(images.raw):
            parser.error(f"--samples: expected a multiple of {size} up to {len(images.raw)}, got {samples}.")
        batches = text_batches(samples, size) if net == "gpt2" else images.batches(samples, size)
        problem = Problem(_trained(net, head, images, options), batches, seed=options.seed)
        cell = report["cells"].setdefault(f"{net}/{head}", {})
        cell.setdefault("commits", {}).update(dict.fromkeys(sections, machine()["commit"]))
        cell |= {"samples": samples, "batch": size}
        write = partial(_write, report, options.out)
        Cell(problem, cell, list(found), options.graph_memory, SIZES[net].reference, write).measure(
            sections, options.rounds
        )
        print("\n".join(table(f"{net}/{head}", cell)), flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s")
    return report


def _options(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with train/<class>/ image files")
    parser.add_argument("--peers", type=Path, default=None, help="folder with the other libraries")
    parser.add_argument("--weights", type=Path, default=None, help="cache file of the trained weights")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write or to extend")
    parser.add_argument("--only", nargs="+", default=[], metavar="NET[/HEAD[/SECTION]]", help="parts instead of all")
    parser.add_argument(
        "--samples", type=int, default=None, help="samples for the Hessian; the default depends on the network"
    )
    parser.add_argument("--batch", type=int, default=None, help="samples in a batch; the default as above")
    parser.add_argument("--steps", type=int, default=None, help="training steps; the default depends on the network")
    parser.add_argument("--train-images", type=int, default=10_000, help="number of training images")
    parser.add_argument("--rounds", type=int, default=1, help="repetitions")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    parser.add_argument("--graph-memory", type=int, default=None, help="bytes of graphs that our operator may keep")
    return parser, parser.parse_args(arguments)


def _chosen(only: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """Return sections by network and head, without PyHessian at equal accuracy on large networks unless selected."""
    cells: dict[tuple[str, str], list[str]] = {}
    for piece in only or [f"{net}/{_heads(net)[0]}" for net in SIZES]:
        net, head, section = [*piece.split("/"), "", ""][:3]
        heads = _heads(net)
        allowed = {"network": (net, SIZES), "head": (head or heads[0], heads), "section": (section or "ours", SECTIONS)}
        for what, (name, names) in allowed.items():
            if name not in names:
                raise ValueError(f"--only: expected a {what} of {', '.join(names)}, got {name!r}.")
        default = [name for name in SECTIONS if name != "equal" or net == "resnet8"]
        for each in [head] if head else heads:
            chosen = cells.setdefault((net, each), [])
            chosen += [name for name in ([section] if section else default) if name not in chosen]
    return cells


def _heads(net: str) -> Sequence[str]:
    """Return the heads of a network. The transformers have a linear layer."""
    return ("linear",) if net in TRANSFORMERS else HEADS


def _trained(net: str, head: str, images: Images, options: argparse.Namespace) -> torch.nn.Module:
    steps = SIZES[net].steps if options.steps is None else options.steps
    same = {"steps": steps, "seed": options.seed, "batch": SIZES[net].train_batch, "cache": options.weights}
    return trained_transformer(net, images, **same) if net in TRANSFORMERS else trained(net, head, images, **same)


def _opened(options: argparse.Namespace, found: dict[str, str]) -> Row:
    """Return a new report, or the one in the file if it has the same options."""
    shared = {name: getattr(options, name) for name in SHARED_OPTIONS}
    report: Row = {"machine": machine(), "versions": found, "options": shared, "cells": {}}
    report["distributions"] = DISTRIBUTIONS
    if options.out is None or not options.out.exists():
        return report
    before: Row = json.loads(options.out.read_text())
    if shared != before["options"]:
        raise ValueError(
            f"--out: expected a file with options {shared}, got {before['options']}. Use another file or these options."
        )
    before["versions"] |= found
    return before


def _write(report: Row, out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

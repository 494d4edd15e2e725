"""Compare the sharpness analysis with PyHessian, curvlinops with scipy, hessian-eigenthings and Landscaper.

Networks briefly trained on images, in evaluation mode. fp32, one CPU thread, all candidates in one process and
interleaved. Measures CPU time of the process and Hessian-vector products over all samples. bench/hessian_peers.py
describes FOLDER of --peers and the use of each library, bench/hessian_report.py the comparison.

    python examples/benchmarks/sharpness.py --images FOLDER --peers FOLDER --weights weights.pt --out sharpness.json
    python examples/benchmarks/sharpness.py ... --only resnet8                       # or resnet8/dense, or
    python examples/benchmarks/sharpness.py ... --only resnet18/soft/curvlinops      # one candidate of one cell

Partial runs with the same commit and options add their results to the same JSON file.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from bench.cifar_nets import HEADS, NETS, load_images, trained
from bench.hessian_cell import SECTIONS, Cell
from bench.hessian_peers import DISTRIBUTIONS, versions
from bench.hessian_problem import Problem, Row
from bench.hessian_report import table
from bench.timing import machine

# Options that partial runs of one file share.
SHARED_OPTIONS = ("samples", "batch", "steps", "train_images", "rounds", "seed", "graph_memory")


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
        size = options.batch or NETS[net].batch
        if options.samples % size or options.samples > len(images.raw):
            parser.error(f"--samples: expected a multiple of {size} up to {len(images.raw)}, got {options.samples}.")
        model = trained(
            net,
            head,
            images,
            steps=NETS[net].steps if options.steps is None else options.steps,
            seed=options.seed,
            cache=options.weights,
        )
        problem = Problem(model, images.batches(options.samples, size), seed=options.seed)
        cell = report["cells"].setdefault(f"{net}/{head}", {})
        Cell(problem, cell, list(found), options.graph_memory, partial(_write, report, options.out)).measure(
            sections, options.rounds or NETS[net].rounds
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
    parser.add_argument("--samples", type=int, default=256, help="number of training images for the Hessian")
    parser.add_argument("--batch", type=int, default=None, help="images in a batch; the default depends on the network")
    parser.add_argument("--steps", type=int, default=None, help="training steps; the default depends on the network")
    parser.add_argument("--train-images", type=int, default=10_000, help="number of training images")
    parser.add_argument("--rounds", type=int, default=None, help="repetitions; the default depends on the network")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    parser.add_argument("--graph-memory", type=int, default=None, help="bytes of graphs that our operator may keep")
    return parser, parser.parse_args(arguments)


def _chosen(only: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """Return sections by network and head, without PyHessian at equal accuracy on large networks unless selected."""
    cells: dict[tuple[str, str], list[str]] = {}
    for piece in only or NETS:
        net, head, section = [*piece.split("/"), "", ""][:3]
        allowed = {"network": (net, NETS), "head": (head or HEADS[0], HEADS), "section": (section or "ours", SECTIONS)}
        for what, (name, names) in allowed.items():
            if name not in names:
                raise ValueError(f"--only: expected a {what} of {', '.join(names)}, got {name!r}.")
        default = [name for name in SECTIONS if name != "equal" or net == "resnet8"]
        for each in [head] if head else HEADS:
            chosen = cells.setdefault((net, each), [])
            chosen += [name for name in ([section] if section else default) if name not in chosen]
    return cells


def _opened(options: argparse.Namespace, found: dict[str, str]) -> Row:
    """Return a new report, or the one in the file if it has the same options and commit."""
    shared = {name: getattr(options, name) for name in SHARED_OPTIONS}
    report: Row = {"machine": machine(), "versions": found, "options": shared, "cells": {}}
    report["distributions"] = DISTRIBUTIONS
    if options.out is None or not options.out.exists():
        return report
    before: Row = json.loads(options.out.read_text())
    for what, mine, theirs in (
        ("options", shared, before["options"]),
        ("commit", report["machine"]["commit"], before["machine"]["commit"]),
    ):
        if mine != theirs:
            raise ValueError(f"--out: expected a file with {what} {mine}, got {theirs}. Use another file.")
    before["versions"] |= found
    return before


def _write(report: Row, out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

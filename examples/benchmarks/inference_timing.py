"""Validate the inference timing: agreement with torch.utils.benchmark, repeatability, and run time of the sweep.

CPU, fp32. The first section compares medians of `inference_timing` and torch.utils.benchmark for the same module, in
turns. The second runs pairs of analyses of one model in one process, and counts how many differ by more than their
intervals, with and without the allowance for drift between runs. The third measures the seconds of the default sweep
for the digits model and for the paper's ResNet-18, each with its sparse head.

    python examples/benchmarks/inference_timing.py --threads 1 --out inference_timing.json     # some ten minutes
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from bench.timing import machine
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from moe_heads import NOISY_TOP_K, Dense, SparseMoE, capacity, match_capacity
from moe_heads.analysis import InferenceTimingResult, inference_timing
from moe_heads.lightning_modules import DigitsCNN, MoEClassifier, ResNet18Cifar

Row = dict[str, object]

_SINGLE_RUNS = 200


def digits() -> nn.Module:
    """Build the study's model for the digits with its sparse head."""
    total = capacity(Dense(64, 10, width=128)).total
    return MoEClassifier(DigitsCNN(), match_capacity("sparse", 64, 10, total=total, tolerance=0.05, **NOISY_TOP_K))


def agreement(repeats: int) -> Iterator[Row]:
    """Compare the medians of both timers for the same module and input.

    torch.utils.benchmark measures the median of single runs, and its usual median of blocks of runs. The mean of a
    block includes the time of other processes, so on a loaded machine it is a different quantity.

    Yields:
        A row for each module.
    """
    modules: dict[str, tuple[nn.Module, Tensor]] = {
        "linear 512": (nn.Linear(512, 512), torch.randn(32, 512)),
        "dense head": (Dense(512, 10), torch.randn(128, 512)),
        "sparse head": (SparseMoE(512, 10, **NOISY_TOP_K), torch.randn(256, 512)),
        "digits model": (digits(), torch.randn(32, 1, 8, 8)),
    }
    for name, (module, x) in modules.items():
        module.eval()
        # its default timer checks for an accelerator in each reading: 75 µs in a CUDA build without a GPU
        timer = Timer("module(x)", globals={"module": module, "x": x}, timer=time.perf_counter)
        ours, theirs, blocks = [], [], []
        for _ in range(repeats):
            result = inference_timing(module, x, batch_sizes=[len(x)], modules=[], seconds_per_size=0.3)
            ours.append(result.rows[0].p50_ms)
            with torch.inference_mode():
                theirs.append(1e3 * statistics.median(timer.timeit(1).median for _ in range(_SINGLE_RUNS)))
                blocks.append(1e3 * timer.blocked_autorange(min_run_time=0.3).median)
        a, b = statistics.median(ours), statistics.median(theirs)
        differences = [abs(mine / their - 1) for mine, their in zip(ours, theirs, strict=True)]
        yield {
            "module": name,
            "inference_timing_ms": round(a, 5),
            "torch_benchmark_ms": round(b, 5),
            "torch_benchmark_blocks_ms": round(statistics.median(blocks), 5),
            "difference": round(a / b - 1, 4),
            "median_difference_of_a_pair": round(statistics.median(differences), 4),
        }


def repeatability(num_pairs: int) -> Iterator[Row]:
    """Count pairs of consecutive runs that disagree by their intervals, with and without the allowance for drift.

    Yields:
        A row for each batch size and module.
    """
    model, x = digits(), torch.randn(64, 1, 8, 8)
    apart: dict[tuple[str, int], list[int]] = {}
    for _ in range(num_pairs):
        first, second = (inference_timing(model, x, batch_sizes=[1, 32]) for _ in range(2))
        others = {(row.module, row.batch_size): row for row in second.rows}
        for a in first.rows:
            b, counts = others[a.module, a.batch_size], apart.setdefault((a.module, a.batch_size), [0, 0])
            counts[0] += not a.agrees_with(b, 0.0)
            counts[1] += not a.agrees_with(b, first.drift_allowance)
    for (module, size), (alone, allowed) in apart.items():
        yield {
            "module": module,
            "batch": size,
            "pairs": num_pairs,
            "apart_by_intervals": alone,
            "apart_by_intervals_and_allowance": allowed,
        }
    alone, allowed = (sum(counts[i] for counts in apart.values()) for i in range(2))
    yield {
        "module": "all",
        "pairs": num_pairs * len(apart),
        "apart_by_intervals": alone,
        "apart_by_intervals_and_allowance": allowed,
    }


def sweeps() -> Iterator[Row]:
    """Measure the seconds of the default sweep.

    Yields:
        A row for each model.
    """
    for name, model, x in (
        ("digits", digits(), torch.randn(64, 1, 8, 8)),
        ("resnet18", MoEClassifier(ResNet18Cifar(), SparseMoE(512, 10, **NOISY_TOP_K)), torch.randn(64, 3, 32, 32)),
    ):
        start = time.perf_counter()
        result = inference_timing(model, x)
        seconds = time.perf_counter() - start
        yield {"model": name, "seconds": round(seconds, 1), **_found(result)}


def _found(result: InferenceTimingResult) -> Row:
    (gap,) = result.gaps
    whole = [row.batch_size for row in result.rows if row.module == "model"]
    return {
        "batch_sizes": whole,
        "batch_sizes_of_the_head": [point.batch_size for point in gap.points],
        "skipped": [str(entry) for entry in result.skipped],
        "is_noisy": result.is_noisy,
        "realized": {point.batch_size: round(point.realized, 3) for point in gap.points},
        "interval": {point.batch_size: [round(point.low, 3), round(point.high, 3)] for point in gap.points},
        "ratio_of_bounds": {point.batch_size: point.bound and round(point.bound, 3) for point in gap.points},
        "theoretical": round(gap.points[0].theoretical, 3),
        "break_even": gap.break_even,
        "verdict": gap.verdict(),
    }


def main() -> None:
    """Run the sections, print one line for each row, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--repeats", type=int, default=11, help="repetitions of the two timers")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of runs of one model")
    parser.add_argument("--only", choices=["agreement", "repeatability", "sweeps"], help="one section instead of all")
    parser.add_argument(
        "--note", default="", help="note in the JSON, such as the load of the machine by other processes"
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sections = {
        "agreement": agreement(options.repeats),
        "repeatability": repeatability(options.pairs),
        "sweeps": sweeps(),
    }
    if options.only is not None:
        sections = {options.only: sections[options.only]}
    report: dict[str, object] = {"machine": machine(), "note": options.note, "seed": 0}
    for name, rows in sections.items():
        done: list[Row] = []
        report[name] = done
        for row in rows:
            done.append(row)
            print(name, "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

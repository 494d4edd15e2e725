"""Compare the choice of "auto" with the fastest path on three instruction sets, to check moe_heads/dispatch/choice.py.

One CPU thread, eager inference, fp32, smallest CPU times. Each instruction set needs a process of its own, because the
libraries read the environment when they start. AVX-512 without AMX and AVX2 are emulated on a newer processor, whose
clock, caches and memory stay the same.

    python examples/benchmarks/dispatch.py --out dispatch.json     # five minutes

Prints for each instruction set the number of shapes for which the path of "auto" takes at most 10 % longer than the
fastest path, and the shapes with the largest losses.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench.timing import machine, time_interleaved

from moe_heads import SparseMoE
from moe_heads.dispatch.choice import path_of

FEATURES = (64, 512, 2048)
SIZES = ((4, 64), (8, 8), (8, 64), (8, 512), (16, 128), (32, 512), (64, 16), (128, 64))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
PATHS = ("all", "ragged", "grouped")
MAX_MACS = 2e9
KINDS: dict[str, dict[str, str]] = {
    "native": {},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}

Row = dict[str, Any]


def measure() -> Iterator[Row]:
    """Time all paths on all shapes in this process.

    Yields:
        The sizes, the path of "auto" and the microseconds of each path.
    """
    for features in FEATURES:
        for num_experts, width in SIZES:
            head = SparseMoE(features, 10, num_experts, width, num_shared_experts=0).eval()
            heads = {path: copy.copy(head) for path in PATHS}
            for path, other in heads.items():
                other.dispatch = path  # type: ignore[assignment]
            for batch in BATCHES:
                if num_experts * width * batch * features > MAX_MACS:
                    continue
                x = torch.randn(batch, features)
                with torch.inference_mode():
                    auto = path_of(head.experts, x, head.router(x), "auto")
                    times = time_interleaved({path: partial(h, x) for path, h in heads.items()}, 15, 1.0, loaded=True)
                sizes = {"features": features, "num_experts": num_experts, "expert_width": width, "batch": batch}
                yield sizes | {"auto": auto} | {f"{path}_us": round(1e3 * ms, 1) for path, ms in times.items()}


def loss(row: Row) -> float:
    """Return the time of the path of "auto" divided by that of the fastest path."""
    return float(row[f"{row['auto']}_us"] / min(row[f"{path}_us"] for path in PATHS))


def summarize(kind: str, rows: list[Row]) -> dict[str, float]:
    """Print and return how near "auto" is to the fastest path."""
    losses = sorted(map(loss, rows))
    summary: dict[str, float] = {
        "shapes": len(rows),
        "within_10_percent": sum(value <= 1.1 for value in losses),
        "within_15_percent": sum(value <= 1.15 for value in losses),
        "worst": round(losses[-1], 2),
    }
    print(kind, "  ".join(f"{name} {value}" for name, value in summary.items()))
    for row in sorted(rows, key=loss)[-3:]:
        print(f"  {loss(row):.2f} ", "  ".join(f"{name} {value}" for name, value in row.items()))
    return summary


def run(kind: str) -> dict[str, object]:
    """Measure in a process with the environment of an instruction set."""
    command = [sys.executable, __file__, "--child"]
    result = subprocess.run(command, env=os.environ | KINDS[kind], stdout=subprocess.PIPE, text=True, check=True)
    described, *rows = map(json.loads, result.stdout.splitlines())
    return {"environment": KINDS[kind], "machine": described, "summary": summarize(kind, rows), "rows": rows}


def main() -> None:
    """Measure the requested instruction sets, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="instruction sets")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        print(json.dumps(machine()))
        for row in measure():
            print(json.dumps(row), flush=True)
        return
    report = {kind: run(kind) for kind in options.kinds}
    if options.out is not None:
        options.out.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()

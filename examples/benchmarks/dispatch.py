"""Time the dispatch paths of the sparse head beside the dense head of equal total parameters.

Forward passes in inference mode, fp32, one CPU thread, interleaved, medians. Prints one line a cell and writes JSON:

    python examples/benchmarks/dispatch.py --out dispatch.json
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from moe_heads import Dense, SparseMoE, capacity, match_capacity

FEATURES, CLASSES, K = 512, 10, 2
SIZES = ((8, 8), (8, 64), (8, 512), (32, 512), (128, 64), (128, 512))
BATCHES = (1, 8, 32, 256, 1024)


def time_cell(num_experts: int, width: int, batch: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of each path, the runs of the paths interleaved."""
    sparse = SparseMoE(FEATURES, CLASSES, num_experts, width, K).eval()
    dense = match_capacity("dense", FEATURES, CLASSES, total=capacity(sparse).total).eval()
    x = torch.randn(batch, FEATURES)
    times: dict[str, list[float]] = {"dense": [], "all": [], "selected": [], "auto": []}
    for run in range(repeats + 3):
        for name, samples in times.items():
            head: Dense | SparseMoE = dense if name == "dense" else sparse
            if name != "dense":
                sparse.dispatch = name
            start = time.perf_counter()
            head(x)
            if run >= 3:
                samples.append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(samples) for name, samples in times.items()}


def main() -> None:
    """Run all cells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for num_experts, width in SIZES:
            for batch in BATCHES:
                medians = time_cell(num_experts, width, batch, options.repeats)
                rows.append({"num_experts": num_experts, "expert_width": width, "batch": batch, **medians})
                times = "  ".join(f"{name} {ms:8.3f}" for name, ms in medians.items())
                print(f"{num_experts:4d} x {width:<4d} B={batch:<5d} ms: {times}", flush=True)
    machine = {
        "processor": platform.processor(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if options.out is not None:
        options.out.write_text(json.dumps({"machine": machine, "repeats": options.repeats, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

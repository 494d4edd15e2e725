"""Run on a machine with a GPU what a machine without one cannot: GPU tests, head times, and the inference timing.

Needs torch, this repository and as much of its dependencies as there is. A part whose packages are missing is skipped,
with the reason in the JSON. The whole takes at most nine minutes.

    make gpu                                                   # writes examples/benchmarks/results/gpu.json
    PYTHONPATH=. python examples/benchmarks/gpu.py --dry-run   # the same steps in seconds, on a CPU
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from moe_heads import Dense, SparseMoE, capacity, match_capacity
from moe_heads.dispatch import Dispatch

ROOT = Path(__file__).parents[2]

Report = dict[str, object]

_FEATURES, _CLASSES = 512, 10
_SIZES, _BATCHES = ((8, 64), (32, 512)), (1, 32, 256, 4096)
_PATHS: tuple[Dispatch, ...] = ("auto", "all", "grouped", "ragged")
_SECONDS_OF_THE_TESTS, _SECONDS_OF_THE_TIMING = 240, 90


def main(arguments: Sequence[str] | None = None) -> Report:
    """Run the parts one by one and write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--dry-run", action="store_true", help="smallest sizes, on the CPU")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("CUDA is not available on this machine. Pass --dry-run to try the steps on a CPU.")
    device = torch.device("cpu" if options.dry_run else "cuda")
    name = "cpu" if options.dry_run else torch.cuda.get_device_name()
    report: Report = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}
    parts: dict[str, Callable[[], object]] = {
        "tests": lambda: gpu_tests(options.dry_run),
        "heads": lambda: head_times(device, options.dry_run),
        "inference_timing": lambda: timing(device, options.dry_run),
    }
    for part, run in parts.items():
        start = time.perf_counter()
        try:
            found = run()
        except ImportError as error:
            found = {"skipped": str(error)}
        report[part] = {"seconds": round(time.perf_counter() - start, 1), "result": found}
        print(part, json.dumps(report[part], indent=1)[:2000], flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def gpu_tests(is_dry: bool) -> Report:
    """Run the tests with the marker ``gpu``; a dry run collects them only.

    Raises:
        ImportError: If pytest is not installed.
    """
    if importlib.util.find_spec("pytest") is None:
        raise ImportError("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *(["--collect-only"] if is_dry else [])]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=_SECONDS_OF_THE_TESTS
        )
    except subprocess.TimeoutExpired:
        return {"returncode": None, "tail": f"ended after {_SECONDS_OF_THE_TESTS} s"}
    return {"returncode": done.returncode, "tail": done.stdout[-1500:] + done.stderr[-500:]}


def head_times(device: torch.device, is_dry: bool) -> list[Report]:
    """Measure the median milliseconds of the sparse head by dispatch path, and of the dense head of equal capacity."""
    rows = []
    for num_experts, width in _SIZES[:1] if is_dry else _SIZES:
        sparse = SparseMoE(_FEATURES, _CLASSES, num_experts, width, k=2).to(device).eval()
        dense = match_capacity("dense", _FEATURES, _CLASSES, total=capacity(sparse).total).to(device).eval()
        for dtype in (torch.float32,) if is_dry else (torch.float32, torch.bfloat16):
            for batch in _BATCHES[:1] if is_dry else _BATCHES:
                x = torch.randn(batch, _FEATURES, device=device, dtype=dtype)
                row: Report = {"num_experts": num_experts, "width": width, "dtype": str(dtype), "batch": batch}
                row["dense_ms"] = _median_ms(dense.to(dtype), x, is_dry)
                for path in _PATHS:
                    sparse.dispatch = path
                    try:
                        row[f"{path}_ms"] = _median_ms(sparse.to(dtype), x, is_dry)
                    except ValueError as error:  # the path does not serve this device or dtype
                        row[f"{path}_ms"] = str(error)
                rows.append(row)
    return rows


def timing(device: torch.device, is_dry: bool) -> Report:
    """Run the inference timing of a small model with a sparse head, and return its metrics."""
    from moe_heads.analysis import Progress, inference_timing

    model = torch.nn.Sequential(Dense(_FEATURES, _FEATURES), torch.nn.ReLU(), SparseMoE(_FEATURES, _CLASSES))
    result = inference_timing(
        model.to(device).eval(),
        torch.randn(8 if is_dry else 256, _FEATURES, device=device),
        batch_sizes=[1] if is_dry else [1, 32, 256],
        seconds_per_size=0.05 if is_dry else 2.0,
        progress=Progress(max_time=_SECONDS_OF_THE_TIMING),
    )
    return dict(result.metrics())


def _median_ms(module: torch.nn.Module, x: torch.Tensor, is_dry: bool) -> float:
    timer = Timer("module(x)", globals={"module": module, "x": x})
    with torch.inference_mode():
        return round(1e3 * timer.blocked_autorange(min_run_time=0.01 if is_dry else 0.5).median, 5)


if __name__ == "__main__":
    main()

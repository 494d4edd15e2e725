"""Interleaved timing, and a description of the machine."""

import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

__all__ = ["machine", "time_interleaved"]


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int = 11,
    block_ms: float = 2.0,
    cold: bool = False,
    loaded: bool = False,
) -> dict[str, float]:
    """Return the median milliseconds per call of each candidate.

    In every round, each candidate runs in random order in a block of calls of about ``block_ms`` (one call if it takes
    longer), so that a slow phase of the machine affects all of them. The first calls before a block are not counted, so
    that caches are warm, as in a loop. With ``cold``, the caches are overwritten before every call. With ``loaded``,
    the result is the smallest CPU time instead of the median time, for one thread of a machine with other work.
    """
    clock = time.process_time if loaded else time.perf_counter
    calls = {}
    for name, call in candidates.items():
        for _ in range(2):
            call()
        start = time.perf_counter()
        call()
        calls[name] = 1 if cold else max(1, round(block_ms / 1e3 / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = random.Random(0)
    flushing = torch.zeros(2**26 if cold else 0)  # 256 MiB
    for _ in range(rounds):
        for name, call in order.sample(list(candidates.items()), len(candidates)):
            if cold:
                flushing.add_(1)
            for _ in range(0 if cold else 1 + calls[name] // 4):
                call()
            start = clock()
            for _ in range(calls[name]):
                call()
            times[name].append(1e3 * (clock() - start) / calls[name])
    return {name: min(samples) if loaded else statistics.median(samples) for name, samples in times.items()}


def machine() -> dict[str, object]:
    """Return processor, device, versions, threads and load."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip(),
    }

"""Benchmark of imports: seconds of a new Python process beyond `import torch`.

Processes take turns in random order, and each time is compared with that of torch in the same round. A first round
caches the bytecode and does not count.

    python examples/benchmarks/import_time.py --out import_time.json
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.timing import machine

_MODULES = ("torch", "moe_heads", "moe_heads.analysis", "lightning.pytorch", "moe_heads.callbacks")


def seconds_of(module: str) -> float:
    """Return the wall time of a Python process that imports a module."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print the medians and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args(arguments)
    order, seconds = random.Random(0), {module: list[float]() for module in _MODULES}
    for number in range(options.rounds + 1):
        for module in order.sample(_MODULES, len(_MODULES)):
            taken = seconds_of(module)
            if number > 0:
                seconds[module].append(taken)
    beyond = {
        module: statistics.median(one - torch for one, torch in zip(taken, seconds["torch"], strict=True))
        for module, taken in seconds.items()
    }
    report = {"machine": machine(), "seconds": seconds, "beyond_torch": beyond}
    for module, difference in beyond.items():
        print(f"import {module}: {statistics.median(seconds[module]):.2f} s, {difference:+.2f} s beyond torch")
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()

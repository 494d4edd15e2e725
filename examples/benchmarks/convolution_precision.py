"""Benchmark behind `fastest_precision`: a training step of one convolution in fp32 and in bf16 on this processor.

Forward and backward pass of a 3x3 convolution in channels_last, 256 images, interleaved medians, in GFLOP/s.

    python examples/benchmarks/convolution_precision.py --threads 2 --out convolution_precision.json
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench.timing import machine, time_interleaved
from torch import nn

from moe_heads.lightning_modules import fastest_precision

# channels and side lengths in pixels of FastCNN
_SIZES = ((32, 15), (128, 15), (128, 7))
_DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}


def training_step(channels: int, size: int, batch: int, dtype: torch.dtype) -> Callable[[], None]:
    """Return a forward and backward pass with gradients for inputs and weights."""
    convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False, dtype=dtype)
    convolution.to(memory_format=torch.channels_last)
    x = torch.randn(batch, channels, size, size, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    slope = torch.randn_like(x)
    return lambda: convolution(x).backward(slope)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print the rates and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {"machine": machine(), "chosen": fastest_precision("cpu"), "cases": {}}
    for channels, size in _SIZES:
        steps = {name: training_step(channels, size, options.batch, dtype) for name, dtype in _DTYPES.items()}
        # one multiplication and one addition each for forward, gradient of the inputs and gradient of the weights
        flop = 3 * 2 * options.batch * size**2 * 9 * channels**2
        milliseconds = time_interleaved(steps, options.rounds)
        rates = {name: flop / 1e6 / ms for name, ms in milliseconds.items()}
        report["cases"][f"{channels} channels, {size}x{size}"] = rates
        listed = ", ".join(f"{rate:.0f} GFLOP/s in {name}" for name, rate in rates.items())
        print(f"{channels} channels, {size}x{size}: {listed}", flush=True)
    print(f"fastest_precision returns {report['chosen']}")
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()

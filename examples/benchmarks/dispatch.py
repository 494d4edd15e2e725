"""Compare the choice of "auto" with the fastest path over 124 shapes, to which moe_heads/dispatch/choice.py is fitted.

    python examples/benchmarks/dispatch.py     # one CPU thread, eager inference, fp32, three minutes

Prints a line for each shape and at the end the number of shapes for which "auto" is within 10 % of the fastest path.
"""

import copy
from functools import partial

import torch
from bench.timing import machine, time_interleaved

from moe_heads import SparseMoE

FEATURES = (64, 512, 2048)
SIZES = ((4, 64), (8, 8), (8, 64), (8, 512), (16, 128), (64, 16))
BATCHES = (2, 8, 16, 32, 64, 256, 1024)
PATHS = ("auto", "all", "ragged", "grouped")


def main() -> None:
    """Time all paths on all shapes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine())
    losses = []
    for features in FEATURES:
        for num_experts, width in SIZES:
            head = SparseMoE(features, 10, num_experts, width).eval()
            heads = {path: copy.copy(head) for path in PATHS}
            for path, other in heads.items():
                other.dispatch = path  # type: ignore[assignment]
            for batch in BATCHES:
                if num_experts * width * batch * features > 4e9:
                    continue
                x = torch.randn(batch, features)
                with torch.inference_mode():
                    times = time_interleaved({path: partial(h, x) for path, h in heads.items()}, 5, 1.0)
                auto = times.pop("auto")
                losses.append(auto / min(times.values()))
                listed = "  ".join(f"{path} {ms:8.3f}" for path, ms in times.items())
                print(
                    f"{features:5d} {num_experts:3d} x {width:<4d} {batch:5d}  {listed}  auto {auto:8.3f}", flush=True
                )
    print(f"within 10 % of the fastest path: {sum(loss < 1.1 for loss in losses)} of {len(losses)} shapes")


if __name__ == "__main__":
    main()

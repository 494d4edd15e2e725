"""Compare the speed of the sparse head with the dense head of equal total parameters, a mask loop, and other libraries.

One CPU thread, fp32, all candidates in one process, interleaved, medians, or with --loaded smallest CPU times (see
bench/timing.py). D = 512, C = 10, k = 2.

    python examples/benchmarks/heads.py --out heads.json                       # eager, a quarter of an hour
    python examples/benchmarks/heads.py --compiled --peers FOLDER --out heads.json   # everything, half an hour

The second command also times the head under torch.compile, which needs a C++ compiler, and other libraries
(bench/peers.py describes FOLDER).
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench.mask_loop import MaskLoop
from bench.peers import davidmrau, feature_layers, token_layers
from bench.roofline import bound_ms, measured_limits
from bench.timing import machine, time_interleaved
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads import NOISY_TOP_K, SparseMoE, capacity, match_capacity

FEATURES, CLASSES, K = 512, 10, 2
SIZES = ((8, 64), (8, 512), (32, 512), (128, 64), (128, 512))
BATCHES = (1, 8, 32, 256, 4096)
TRAINING_SIZES, TRAINING_BATCHES = ((8, 64), (32, 512)), (256, 4096)
Row = dict[str, object]
Candidates = dict[str, Callable[[Tensor], object]]


def with_path(head: SparseMoE, path: str) -> SparseMoE:
    """Return a head with the same weights and another dispatch."""
    other = copy.copy(head)
    other.dispatch = path  # type: ignore[assignment]
    return other


def in_place_compiled(module: nn.Module) -> nn.Module:
    """Return a compiled copy of a module that shares its weights."""
    other = copy.copy(module)
    other.compile(fullgraph=True, dynamic=False)
    return other


def build(num_experts: int, width: int, options: Mapping[str, Any] = NOISY_TOP_K) -> tuple[SparseMoE, nn.Module]:
    """Build the sparse head and the dense head of equal total parameters."""
    head = SparseMoE(FEATURES, CLASSES, num_experts, width, K, **options)
    dense = match_capacity("dense", FEATURES, CLASSES, total=capacity(head).total)
    return head, dense


def inference(
    rounds: int, loaded: bool, peers: Path | None, compiled: bool, batches: Sequence[int] = BATCHES
) -> Iterator[Row]:
    """Time forward passes in eager mode, by every path, and under torch.compile (fullgraph, one graph for each shape).

    Yields:
        A row for each cell.
    """
    for num_experts, width in SIZES:
        head, dense = build(num_experts, width)
        head.eval()
        dense.eval()
        loop = MaskLoop(head).eval()
        for batch in batches:
            torch.compiler.reset()
            x = torch.randn(batch, FEATURES)
            candidates: Candidates = {"dense": dense, "mask_loop": loop}
            candidates |= {path: with_path(head, path) for path in ("auto", "all", "ragged", "grouped")}
            if compiled:
                candidates |= {"dense_compiled": in_place_compiled(dense), "auto_compiled": in_place_compiled(head)}
            if peers is not None:
                candidates["davidmrau"] = davidmrau(peers, FEATURES, CLASSES, num_experts, width, K)
            repeats = 5 if num_experts * width * batch > 10**7 else rounds
            with torch.inference_mode():
                expected = with_path(head, "all")(x)
                for name, candidate in candidates.items():
                    if not name.startswith(("dense", "davidmrau")):  # these compute a different function
                        torch.testing.assert_close(candidate(x), expected, rtol=1e-3, atol=1e-4)
                times = time_interleaved(_bound(candidates, x), repeats, loaded=loaded)
                chosen = [name for name in candidates if name.startswith(("dense", "auto", "mask_loop"))]
                cold = {name: candidates[name] for name in chosen}
                cold_times = time_interleaved(_bound(cold, x), repeats, cold=True, loaded=loaded)
                bound = bound_ms(head, x)
            row = _row(num_experts, width, batch, times | {f"{name}_cold": ms for name, ms in cold_times.items()})
            yield row | {"roofline_ms": round(bound, 4), "roofline_share": round(bound / times["auto"], 3)}


def default(rounds: int, loaded: bool) -> Iterator[Row]:
    """Time forward passes of the smallest head with its default options: shared experts, and a normalized gate.

    Yields:
        A row for each cell.
    """
    head, dense = build(*SIZES[0], {})
    for batch in BATCHES:
        candidates: Candidates = {"dense": dense.eval(), "auto": head.eval()}
        with torch.inference_mode():
            times = time_interleaved(_bound(candidates, torch.randn(batch, FEATURES)), rounds, loaded=loaded)
        yield _row(*SIZES[0], batch, times)


def training(rounds: int, loaded: bool) -> Iterator[Row]:
    """Time forward and backward passes of cross-entropy (and balance losses), with the gradient of the features.

    Yields:
        A row for each cell.
    """
    for num_experts, width in TRAINING_SIZES:
        for batch in TRAINING_BATCHES:
            head, dense = build(num_experts, width)
            x, y = torch.randn(batch, FEATURES, requires_grad=True), torch.randint(CLASSES, (batch,))

            def step(module: nn.Module, balance: bool, x: Tensor = x, y: Tensor = y) -> None:
                module.zero_grad()
                x.grad = None
                output = module(x, return_routing=True)
                loss = F.cross_entropy(output.logits, y)
                (loss + output.aux_loss if balance else loss).backward()

            modules = {"dense": dense, "auto": head, "all": with_path(head, "all")}
            candidates = {name: partial(step, module, False) for name, module in modules.items()}
            candidates["auto_with_balance"] = partial(step, head, True)
            slow = num_experts * width * batch > 10**7
            yield _row(num_experts, width, batch, time_interleaved(candidates, 3 if slow else rounds, loaded=loaded))


def layers(rounds: int, loaded: bool) -> Iterator[Row]:
    """Time layers of other libraries, which map features to features, and our heads with C = D at equal sizes.

    Yields:
        A row for each cell.
    """
    for kind, build_layers, shapes in (
        ("features", feature_layers, [(batch, FEATURES) for batch in (1, 32, 256, 4096)]),
        ("tokens", token_layers, [(batch, 16, FEATURES) for batch in (1, 32, 256)]),
    ):
        for num_experts, width in ((8, 64), (32, 512)):
            candidates = build_layers(FEATURES, num_experts, width, K)
            for shape in shapes:
                if shape[0] > 32:
                    candidates.pop("transformers_batched_mm", None)  # copies weights for every row, takes minutes
                with torch.inference_mode():
                    times = time_interleaved(_bound(candidates, torch.randn(shape)), min(rounds, 7), loaded=loaded)
                yield _row(num_experts, width, shape[0], times) | {"input": kind}


def main() -> None:
    """Run the selected sections, print one line for each cell, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed blocks of each candidate")
    parser.add_argument("--loaded", action="store_true", help="smallest CPU times, for a machine with other work")
    parser.add_argument("--compiled", action="store_true", help="also time under torch.compile")
    parser.add_argument("--peers", type=Path, default=None, help="folder with the other libraries")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="batch sizes of inference")
    sections = ["inference", "default", "training", "layers"]
    parser.add_argument("--only", nargs="+", choices=sections, help="some sections instead of all")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    if options.only is not None and "layers" in options.only and options.peers is None:
        parser.error("--only layers: expected --peers, got none.")
    if options.peers is not None:
        if not (options.peers / "davidmrau" / "moe.py").is_file():
            parser.error(f"--peers: expected a folder as described in bench/peers.py, got {options.peers}.")
        sys.path.append(str(options.peers))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    runs = {
        "inference": inference(options.rounds, options.loaded, options.peers, options.compiled, options.batches),
        "default": default(options.rounds, options.loaded),
        "training": training(options.rounds, options.loaded),
    }
    if options.peers is not None:
        runs["layers"] = layers(options.rounds, options.loaded)
    if options.only is not None:
        runs = {name: runs[name] for name in options.only}
    report: dict[str, object] = {"machine": machine(), "limits": measured_limits(), "rounds": options.rounds, "seed": 0}
    report["times"] = "smallest CPU times" if options.loaded else "medians"
    start = time.perf_counter()
    for name, rows in runs.items():
        done = report[name] = []
        for row in rows:
            done.append(row)
            print(name, "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{time.perf_counter() - start:.0f} s")


def _bound(candidates: Candidates, x: Tensor) -> dict[str, Callable[[], object]]:
    return {name: partial(call, x) for name, call in candidates.items()}


def _row(num_experts: int, width: int, batch: int, times: dict[str, float]) -> Row:
    sizes = {"num_experts": num_experts, "expert_width": width, "batch": batch}
    return sizes | {f"{name}_ms": round(ms, 4) for name, ms in times.items()}


if __name__ == "__main__":
    main()

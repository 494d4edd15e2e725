"""Memory and time of the largest Hessian eigenvalue of GPT-2 small and ViT-B/16.

The memory is the resident memory of the process beyond what it has after a backward pass: weights and gradients. Run
one model per process, because an allocator keeps pages.

    python examples/benchmarks/large_models.py --model gpt2 --out large_models.json
"""

import argparse
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from bench.timing import machine
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import vit_b_16
from transformers import GPT2Config, GPT2LMHeadModel

from moe_heads.analysis import Progress, sharpness

Loss = Callable[[nn.Module, Any], Tensor]

_GIB = 2**30


def language_model(**sizes: int) -> tuple[nn.Module, Loss, Any]:
    """Return a GPT-2, its own loss, and 2 · 128 random tokens."""
    model = GPT2LMHeadModel(GPT2Config(**sizes))  # type: ignore[arg-type]
    tokens = torch.randint(0, model.config.vocab_size, (2, 128))
    return model, lambda m, batch: m(input_ids=batch, labels=batch).loss, tokens


def image_model() -> tuple[nn.Module, Loss, Any]:
    """Return a ViT-B/16, the cross-entropy, and two images of noise."""
    batch = (torch.randn(2, 3, 224, 224), torch.randint(0, 1000, (2,)))
    return vit_b_16(), lambda m, b: F.cross_entropy(m(b[0]), b[1]), batch


MODELS: Mapping[str, Callable[[], tuple[nn.Module, Loss, Any]]] = {
    "gpt2": language_model,
    "vit_b_16": image_model,
    "tiny": lambda: language_model(n_layer=1, n_embd=16, n_head=2, vocab_size=64),
}


class PeakMemory:
    """Largest resident memory of this process while the block runs, in bytes above its start.

    Attributes:
        peak: The bytes.
    """

    def __enter__(self) -> "PeakMemory":
        self._start, self.peak, self._is_over = _resident(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.005):
            self.peak = max(self.peak, _resident() - self._start)


def trained(model: nn.Module, loss_fn: Loss, batch: Any, steps: int) -> None:
    """Take some steps of Adam on the batch, and leave a gradient."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4) if steps else None
    for step in range(steps + 1):
        model.zero_grad()
        loss_fn(model, batch).backward()
        if optimizer is not None and step < steps:
            optimizer.step()


def measured(name: str, steps: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return memory, times and the eigenvalue of one model."""
    torch.manual_seed(0)
    model, loss_fn, batch = MODELS[name]()
    trained(model, loss_fn, batch, steps)
    num_parameters = sum(p.numel() for p in model.parameters())
    first: dict[str, float] = {}
    began, processor = time.perf_counter(), time.process_time()

    def seconds(prefix: str) -> dict[str, float]:
        wall, cpu = time.perf_counter() - began, time.process_time() - processor
        return {f"{prefix}_seconds": round(wall, 1), f"{prefix}_cpu_seconds": round(cpu, 1)}

    def show(done: int, total: int | None, quantities: Mapping[str, float]) -> None:
        if not first:
            first.update(seconds("first_value"))
        print(f"{time.perf_counter() - began:7.1f} s, {done} products, {dict(quantities)}", flush=True)

    with PeakMemory() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = sharpness(
            model,
            loss_fn,
            [batch],
            num_eigenvalues=1,
            trace=False,
            density=False,
            progress=Progress(show=show),
            **options,
        )
    return {
        "model": name,
        "training_steps": steps,
        "options": dict(options),
        "num_parameters": num_parameters,
        "vector_gib": round(4 * num_parameters / _GIB, 3),
        "peak_gib": round(memory.peak / _GIB, 2),
        "peak_vectors": round(memory.peak / 4 / num_parameters, 1),
        **first,
        **seconds("total"),
        "num_products": result.num_products,
        "lambda_max": result.lambda_max,
        "residual": result.residuals[0],
        "converged": result.eigenvalues_converged,
        "certificate": {} if result.certificate is None else result.certificate.metrics(),
        "unchecked": {} if result.certificate is None else dict(result.certificate.unchecked),
    }


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE")


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark of one model and add it to the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=tuple(MODELS), default="gpt2")
    parser.add_argument("--steps", type=int, default=0, help="steps of Adam on the batch before the analysis")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    before = machine()
    found = measured(given.model, given.steps, {"tolerance": given.tolerance, "max_steps": given.max_steps})
    print(json.dumps(found, indent=2))
    if given.out is not None:
        entries = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else []
        entries.append({**found, "machine": before})
        given.out.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

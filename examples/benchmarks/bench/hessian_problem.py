"""The Hessian that all candidates analyze, its exact product, and records of their times and products."""

import copy
import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Account", "Counted", "Problem", "Row", "cpu_seconds", "described", "interleaved_cpu_seconds"]

T = TypeVar("T")
Row = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """The Hessian of the mean cross-entropy of a model over batches of equal size.

    Attributes:
        model: The model in evaluation mode.
        batches: Pairs of inputs and labels.
        num_eigenvalues: Number of largest eigenvalues.
        tolerance: Largest relative residual of the eigenvalues.
        trace_tolerance: Standard error of the trace as a fraction of the larger of |tr H| and the Frobenius norm.
        density_steps: Lanczos steps of the spectral density.
        seed: Seed of every candidate's random vectors.
    """

    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    num_eigenvalues: int = 5
    tolerance: float = 1e-3
    trace_tolerance: float = 0.05
    density_steps: int = 40
    seed: int = 0

    @property
    def criterion(self) -> nn.CrossEntropyLoss:
        """The loss as a module."""
        return nn.CrossEntropyLoss()

    @property
    def params(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters, P."""
        return sum(p.numel() for p in self.params)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean loss of a batch."""
        loss: Tensor = self.criterion(model(batch[0]), batch[1])
        return loss

    def apart(self) -> "Problem":
        """Return the same problem with a copy of the model, since candidates modify gradients, graphs or buffers."""
        return Problem(copy.deepcopy(self.model), **{k: v for k, v in vars(self).items() if k != "model"})

    def gradient(self) -> None:
        """Compute the plain gradient over all batches, the unit of the costs."""
        for batch in self.batches:
            torch.autograd.grad(self.loss(self.model, batch), self.params)

    def product(self, vector: Tensor) -> Tensor:
        """Return Hv (P,) by double backward, slow and independent of all candidates."""
        total = torch.zeros_like(vector)
        for batch in self.batches:
            total += self.derivative(self.differentiated_gradient(batch), vector)
        return total / len(self.batches)

    def differentiated_gradient(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Return the gradient of a batch with its graph."""
        return torch.autograd.grad(self.loss(self.model, batch), self.params, create_graph=True)

    def derivative(self, gradient: tuple[Tensor, ...], vector: Tensor) -> Tensor:
        """Return the product with the Hessian of the batch of a gradient (P,), whose graph is kept."""
        parts = [
            part.view_as(p) for part, p in zip(vector.split([p.numel() for p in self.params]), self.params, strict=True)
        ]
        rows = torch.autograd.grad(gradient, self.params, parts, retain_graph=True, materialize_grads=True)
        return torch.cat([row.reshape(-1) for row in rows])

    def residuals(self, eigenvalues: list[float], vectors: list[Tensor]) -> list[float]:
        """Return the true relative residuals ‖Hv - λv‖ / |λ| of the pairs in their order."""
        pairs = [(value, vector / vector.norm()) for value, vector in zip(eigenvalues, vectors, strict=True)]
        return [float((self.product(v) - value * v).norm() / abs(value)) for value, v in pairs]


class Counted:
    """A function that counts its calls."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.calls = 0

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        self.calls += 1
        return self._call(*arguments)


class Account:
    """CPU seconds, products and errors of each part of a measurement.

    Args:
        counted: The product of the candidate.

    Attributes:
        row: Entries for the JSON.
    """

    def __init__(self, counted: Counted) -> None:
        self._counted = counted
        self.row: Row = {}

    def part(self, name: str, call: Callable[[], T]) -> T | None:
        """Return the result of the call, or None if it raised an error, which is recorded."""
        products, start = self._counted.calls, time.process_time()
        value = None
        try:
            value = call()
        except Exception as error:  # a library under test may raise anything
            self.row[f"{name}_error"] = described(error)
        self.row[f"{name}_cpu_s"] = time.process_time() - start
        self.row[f"{name}_products"] = self._counted.calls - products
        return value

    def total(self, *parts: str) -> Row:
        """Add the sums over the parts and return the row."""
        for unit in ("cpu_s", "products"):
            self.row[unit] = sum(self.row[f"{part}_{unit}"] for part in parts if f"{part}_{unit}" in self.row)
        return self.row


def described(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"


def cpu_seconds(call: Callable[[], object]) -> float:
    """Return the CPU seconds of this process in the call."""
    gc.collect()  # graphs that an earlier candidate left in reference cycles
    start = time.process_time()
    call()
    return time.process_time() - start


def interleaved_cpu_seconds(
    candidates: Mapping[str, Callable[[], object]], rounds: int, seed: int = 0
) -> dict[str, list[float]]:
    """Return the CPU seconds of each candidate in each round, in random order, after one warm-up call."""
    for call in candidates.values():
        call()
    order = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in order.sample(list(candidates.items()), len(candidates)):
            times[name].append(cpu_seconds(call))
    return times

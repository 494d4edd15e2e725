"""Oracles for curvature: dense float64 Hessians, and dense matrices behind the operator interface."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class DenseOperator:
    """A symmetric matrix, or the sum of several, as an operator; counts its products, those with a part as a part."""

    def __init__(self, *parts: Tensor) -> None:
        matrix = torch.stack(parts).sum(0)
        self.matrix, self._parts = matrix, parts
        self.num_strata = len(parts)
        self.shape = (len(matrix), len(matrix))
        self.dtype = matrix.dtype
        self.device = matrix.device
        self.num_products = 0.0
        self.stratum_weights = torch.full((len(parts),), 1 / len(parts), dtype=torch.float64)
        self.forms = torch.zeros(len(parts), dtype=torch.float64)

    def matvec(self, vector: Tensor, stratum: int | None = None) -> Tensor:
        self.num_products += 1 if stratum is None else 1 / self.num_strata
        if stratum is None:
            self.forms = torch.stack([vector @ part @ vector for part in self._parts]).double()
        return (self.matrix if stratum is None else self._parts[stratum]) @ vector


def symmetric(eigenvalues: Sequence[float] | Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """A dense symmetric matrix with these eigenvalues and random eigenvectors."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    return ((rotation * values) @ rotation.T).to(dtype)


class Once(torch.autograd.Function):
    """The square, without a second derivative."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def dense_hessian(model: nn.Module, loss_fn: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> Tensor:
    """Hessian by torch.func (forward over reverse), for a model in float64; all parameters, in their order."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    shapes = [p.shape for p in named.values()]
    sizes = [p.numel() for p in named.values()]

    class Bound(nn.Module):
        def __init__(self, values: dict[str, Tensor]) -> None:
            super().__init__()
            self.values = values

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.functional_call(model, self.values, (x,))

    def loss(flat: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        return loss_fn(Bound(dict(zip(named, parts, strict=True))), batch)

    with warnings.catch_warnings():
        # torch's own jvp decompositions use torch.jit.script, which torch deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        return torch.func.hessian(loss)(torch.cat([p.reshape(-1) for p in named.values()]))


def dense_gauss_newton(
    model: nn.Module,
    outputs_fn: Callable[[nn.Module, Any], Tensor],
    output_loss: Callable[[Tensor, Any], Tensor],
    batch: Any,
) -> Tensor:
    """Gauss-Newton matrix from the Jacobian of every output, row by row; all parameters, in their order."""
    params = list(model.parameters())
    outputs = outputs_fn(model, batch)
    rows = [
        torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True, materialize_grads=True)
        for entry in outputs.reshape(-1)
    ]
    jacobian = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        inner = torch.func.hessian(lambda flat: output_loss(flat.view_as(outputs), batch))(outputs.detach().reshape(-1))
    return jacobian.T @ inner @ jacobian


def small_mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A smooth network of 57 parameters."""
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def small_cnn() -> nn.Sequential:
    """Convolution, batch norm with running statistics of its own, ReLU, pooling."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 3),
    )
    model(torch.randn(32, 1, 8, 8))
    return model


def classification(num_samples: int, *shape: int, dtype: torch.dtype = torch.float64) -> Batch:
    return torch.randn(num_samples, *shape, dtype=dtype), torch.randint(0, 3, (num_samples,))

"""Losses and models of which the usual product is wrong: no means over samples, and gradients that are no derivatives.

Shapes: N samples, C classes.
"""

import random
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import weight_norm
from torch.utils.checkpoint import checkpoint

__all__ = ["NO_DERIVATIVES", "NO_MEANS", "UNSTEADY", "mlp"]

Batch = tuple[Tensor, Tensor]
LossFn = Callable[[nn.Module, Batch], Tensor]


def mlp() -> nn.Module:
    """A network of 27 parameters on 4 features, with 3 outputs."""
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()


# --- no means over samples ------------------------------------------------------------------------------------------


def _class_weights(model: nn.Module, batch: Batch) -> Tensor:
    weight = torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64)
    return F.cross_entropy(model(batch[0]), batch[1], weight=weight)


def _without_padding(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over what is not padding, as of tokens."""
    return F.cross_entropy(model(batch[0]), batch[1], ignore_index=0)


def _by_total_weight(model: nn.Module, batch: Batch) -> Tensor:
    weights = batch[0][:, 0].abs()
    return (F.cross_entropy(model(batch[0]), batch[1], reduction="none") * weights).sum() / weights.sum()


def _info_nce(model: nn.Module, batch: Batch) -> Tensor:
    """Each sample against all others of its batch."""
    one, other = (F.normalize(model(x), dim=1) for x in (batch[0], batch[0].roll(1, 1)))
    return F.cross_entropy(one @ other.T / 0.5, torch.arange(len(one)))


def _dice(model: nn.Module, batch: Batch) -> Tensor:
    p, y = model(batch[0]).softmax(1), F.one_hot(batch[1], 3)
    return 1 - (2 * (p * y).sum(0) / (p.sum(0) + y.sum(0))).mean()


def _sum(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def _root(model: nn.Module, batch: Batch) -> Tensor:
    """The root of the mean of squares."""
    return (model(batch[0]) - F.one_hot(batch[1], 3)).square().mean().sqrt()


def _batch_statistics(model: nn.Module, batch: Batch) -> Tensor:
    """Outputs normalized over the batch, as by a batch norm that stays in training mode."""
    return F.cross_entropy(F.batch_norm(model(batch[0]), None, None, training=True), batch[1])


def _variance(model: nn.Module, batch: Batch) -> Tensor:
    """Pushes the outputs of a batch apart."""
    return F.relu(1 - model(batch[0]).std(0)).mean()


def _pairs(model: nn.Module, batch: Batch) -> Tensor:
    """Ranks every sample against every other one."""
    scores, x = model(batch[0])[:, 0], batch[0][:, 0]
    return F.softplus((scores[:, None] - scores) * torch.sign(x - x[:, None])).mean()


def _worst(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none").max()


def _log_mean(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none").exp().mean().log()


NO_MEANS: Mapping[str, LossFn] = {
    "class weights": _class_weights,
    "mean without padding": _without_padding,
    "divided by the batch's weights": _by_total_weight,
    "InfoNCE": _info_nce,
    "Dice": _dice,
    "sum": _sum,
    "root mean square": _root,
    "batch statistics": _batch_statistics,
    "variance over the batch": _variance,
    "pairs": _pairs,
    "worst sample": _worst,
    "log of a mean": _log_mean,
}


# --- gradients that are no derivatives of the loss ------------------------------------------------------------------


class _ScaledSquare(torch.autograd.Function):
    """The square with half of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


class _ConstantSlope(torch.autograd.Function):
    """The square; its slope is computed in the forward pass, so that a second derivative takes it for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 2 * x.detach()
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.slope


class _Reversed(torch.autograd.Function):
    """The identity, which turns gradients around."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class _Recomputed(torch.autograd.Function):
    """A reentrant checkpoint under another name: gradients of what lies inside go to ``.grad`` and nowhere else."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
        x = ctx.saved_tensors[0].detach().requires_grad_(True)
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, grad.detach())
        return None, x.grad


class _Between(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.function, self.last = nn.Linear(4, 3), function, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.function(self.first(x))))


class _Inside(nn.Module):
    """A middle layer that is run by something else."""

    def __init__(self, run: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 2), nn.Linear(2, 3), nn.Linear(3, 3)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.run(self.middle, torch.tanh(self.first(x)))))


class _Quantized(nn.Module):
    """Weights that are rounded, with the gradients of those that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        rounded = weight + ((weight * 4).round() / 4 - weight).detach()
        return self.last(torch.tanh(F.linear(x, rounded, self.layer.bias)))


def _rounded(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def _constant_length(x: Tensor) -> Tensor:
    return x / x.detach().norm(dim=1, keepdim=True)


def _clipped(x: Tensor) -> Tensor:
    y = x.clone()
    if y.requires_grad:
        y.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    return y


def _hooked() -> nn.Module:
    model = mlp()
    model[0].weight.register_hook(lambda grad: grad / 2)
    return model


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in many models
        layer = weight_norm(nn.Linear(4, 3))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 3)).double()


def _new_weight_norm() -> nn.Module:
    layer = parametrizations.weight_norm(nn.Linear(4, 3))
    with torch.no_grad():
        layer.parametrizations.weight.original1.mul_(torch.tensor([[1.0, 3.0, 0.2, 1.0]]))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 3)).double()


def _cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _focal(model: nn.Module, batch: Batch) -> Tensor:
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return ((1 - torch.exp(-losses.detach())).square() * losses).mean()


def _distilled(model: nn.Module, batch: Batch) -> Tensor:
    """Its own sharpened outputs are the targets."""
    logits = model(batch[0])
    return F.kl_div(logits.log_softmax(1), (2 * logits.detach()).softmax(1), reduction="batchmean")


def _twin(model: nn.Module, batch: Batch) -> Tensor:
    """The angle between the outputs of two views, one of them fixed (SimSiam)."""
    return -F.cosine_similarity(model(batch[0]), model(batch[0].roll(1, 1)).detach()).mean()


def _of_between(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: _Between(function).double()


def _reentrant(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(layer, x, use_reentrant=True)


def _recomputed(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return _Recomputed.apply(layer, x)


NO_DERIVATIVES: Mapping[str, tuple[Callable[[], nn.Module], LossFn, list[str] | None]] = {
    "half of the gradient": (_of_between(_ScaledSquare.apply), _cross_entropy, None),
    "constant slope": (_of_between(_ConstantSlope.apply), _cross_entropy, None),
    "reversed gradient": (_of_between(_Reversed.apply), _cross_entropy, None),
    "rounded activations": (_of_between(_rounded), _cross_entropy, None),
    "rounded weights": (lambda: _Quantized().double(), _cross_entropy, None),
    "constant length": (_of_between(_constant_length), _cross_entropy, None),
    "clipped gradient": (_of_between(_clipped), _cross_entropy, None),
    "hook of a parameter": (_hooked, _cross_entropy, None),
    "weight norm of torch": (_new_weight_norm, _cross_entropy, None),
    "weight norm of torch, old": (_old_weight_norm, _cross_entropy, None),
    "focal loss, constant weights": (mlp, _focal, None),
    "targets of its own": (mlp, _distilled, None),
    "fixed twin": (mlp, _twin, None),
    "reentrant checkpoint": (lambda: _Inside(_reentrant).double(), _cross_entropy, None),
    "reentrant checkpoint, its layer": (lambda: _Inside(_reentrant).double(), _cross_entropy, ["middle"]),
    "reentrant checkpoint, its layer and the last": (
        lambda: _Inside(_reentrant).double(),
        _cross_entropy,
        ["middle", "last"],
    ),
    "reentrant checkpoint, the last layer": (lambda: _Inside(_reentrant).double(), _cross_entropy, ["last"]),
    "recomputed": (lambda: _Inside(_recomputed).double(), _cross_entropy, None),
    "recomputed, its layer and the last": (
        lambda: _Inside(_recomputed).double(),
        _cross_entropy,
        ["middle", "last"],
    ),
}


# --- losses that are others in each call ----------------------------------------------------------------------------


class _Counting(nn.Module):
    """Gets colder with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = mlp(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x) * (1 + self.calls / 10)


class _Remembering(nn.Module):
    """A running mean that is also updated in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.mean(0), 0.2)
        return self.net(x - self.mean)


def _noisy(model: nn.Module, batch: Batch) -> Tensor:
    return _cross_entropy(model, batch) * (1 + random.random())


UNSTEADY: Mapping[str, tuple[Callable[[], nn.Module], LossFn]] = {
    "counts its calls": (_Counting, _cross_entropy),
    "running mean in evaluation mode": (_Remembering, _cross_entropy),
    "Python's random numbers": (mlp, _noisy),
}

"""Losses of the oracle: means over samples, computed in the many ways that people write.

Shapes: N samples, C outputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.oracle_batches import Container, Fields

__all__ = ["HABITS", "LOSSES", "Habit", "Loss", "loss_function"]

Each = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss of one sample.

    Attributes:
        each: Losses (N,) of outputs (N, C) and targets.
        targets: Makes targets for N and C, float64 or int64.
        least_outputs: Fewest outputs C.
    """

    each: Each
    targets: Callable[[int, int], Tensor]
    least_outputs: int = 1


@dataclass(frozen=True)
class Habit:
    """A way to write the mean over the samples of a batch.

    Attributes:
        compute: ``compute(loss, container, like, model, batch) -> scalar``.
        weight: How often it is drawn.
        fits: Whether it can be used with a container.
        is_weighted: Whether the batch has to have weights "w".
        changes: Whether it changes the batch, which the analysis may reject.
    """

    compute: Callable[[Loss, Container, Fields, nn.Module, Any], Tensor]
    weight: int
    fits: Callable[[Container], bool] = lambda container: True
    is_weighted: bool = False
    changes: bool = False


def _classes(n: int, c: int) -> Tensor:
    return torch.randint(0, c, (n,))


def _values(n: int, c: int) -> Tensor:
    return torch.randn(n, c, dtype=torch.float64)


def _bits(n: int, c: int) -> Tensor:
    return torch.randint(0, 2, (n, c)).double()


def _counts(n: int, c: int) -> Tensor:
    return torch.randint(0, 4, (n, c)).double()


def _shares(n: int, c: int) -> Tensor:
    return torch.randn(n, c, dtype=torch.float64).softmax(1)


def _smooth_margin(z: Tensor, y: Tensor) -> Tensor:
    margins = 1 + z - z.gather(1, y[:, None])
    return F.softplus(margins).sum(1) - F.softplus(torch.ones_like(z[:, 0]))


def _focal(z: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    return (1 - torch.exp(-losses)).square() * losses


def _gaussian(z: Tensor, y: Tensor) -> Tensor:
    variance = F.softplus(z[:, -1]) + 0.1
    return ((z[:, 0] - y[:, 0]).square() / variance + variance.log()) / 2


LOSSES: Mapping[str, Loss] = {
    "cross entropy": Loss(lambda z, y: F.cross_entropy(z, y, reduction="none"), _classes, 2),
    "label smoothing": Loss(lambda z, y: F.cross_entropy(z, y, reduction="none", label_smoothing=0.1), _classes, 2),
    "squared error": Loss(lambda z, y: (z - y).square().mean(1), _values),
    "squared error, summed outputs": Loss(lambda z, y: F.mse_loss(z, y, reduction="none").sum(1), _values),
    "huber": Loss(lambda z, y: F.smooth_l1_loss(z, y, reduction="none").mean(1), _values),
    "log cosh": Loss(lambda z, y: torch.logaddexp(z - y, y - z).mean(1), _values),
    "binary": Loss(lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="none").mean(1), _bits),
    "poisson": Loss(lambda z, y: F.poisson_nll_loss(z, y, reduction="none").mean(1), _counts),
    "soft targets": Loss(lambda z, y: F.kl_div(z.log_softmax(1), y, reduction="none").sum(1), _shares, 2),
    "cosine": Loss(lambda z, y: 1 - F.cosine_similarity(z, y), _values, 2),
    "smooth margin": Loss(_smooth_margin, _classes, 2),
    "focal": Loss(_focal, _classes, 2),
    "gaussian": Loss(_gaussian, _values, 2),
    "unlearned": Loss(lambda z, y: -F.cross_entropy(z, y, reduction="none"), _classes, 2),
}


def _outputs(model: nn.Module, fields: Fields) -> Tensor:
    return model(*(value for name, value in fields.items() if name not in {"y", "w"}))


def _losses(loss: Loss, container: Container, like: Fields, model: nn.Module, batch: Any) -> tuple[Tensor, Fields]:
    fields = container.unpack(batch, like)
    return loss.each(_outputs(model, fields), fields["y"]), fields


def _plain(loss: Loss, container: Container, like: Fields, model: nn.Module, batch: Any) -> Tensor:
    return _losses(loss, container, like, model, batch)[0].mean()


def _weighted(loss: Loss, container: Container, like: Fields, model: nn.Module, batch: Any) -> Tensor:
    losses, fields = _losses(loss, container, like, model, batch)
    return (losses * fields["w"]).mean()


def _penalized(loss: Loss, container: Container, like: Fields, model: nn.Module, batch: Any) -> Tensor:
    penalty = sum(p.square().sum() for p in model.parameters())
    return _plain(loss, container, like, model, batch) + 0.01 * penalty


def _listed(loss: Loss, container: Container, like: Fields, model: nn.Module, batch: Any) -> Tensor:
    """Reads targets as Python numbers: samples above zero count for half as much again."""
    losses, fields = _losses(loss, container, like, model, batch)
    targets = fields["y"].reshape(len(losses), -1)[:, 0].tolist()
    return (losses * losses.new_tensor([1.5 if value > 0 else 1.0 for value in targets])).mean()


def _item(loss: Loss, container: Container, like: Fields, model: nn.Module, batch: Any) -> Tensor:
    losses, fields = _losses(loss, container, like, model, batch)
    return (losses * losses.new_tensor([weight.item() for weight in fields["w"]])).mean()


def _branch(loss: Loss, container: Container, like: Fields, model: nn.Module, batch: Any) -> Tensor:
    """A term that is there only where a batch has targets above zero."""
    losses, fields = _losses(loss, container, like, model, batch)
    above = fields["y"].reshape(len(losses), -1)[:, 0] > 0
    total = losses[~above].sum() / len(losses)
    if above.any():
        total = total + 1.5 * losses[above].sum() / len(losses)
    return total


def _popped(loss: Loss, container: Container, like: Fields, model: nn.Module, batch: Any) -> Tensor:
    assert container.pop is not None
    y = container.pop(batch, like)
    fields = container.unpack(batch, {name: value for name, value in like.items() if name != "y"})
    return loss.each(_outputs(model, fields), y).mean()


def _replaced(loss: Loss, container: Container, like: Fields, model: nn.Module, batch: Any) -> Tensor:
    assert container.put is not None
    x = container.unpack(batch, like)["x"]
    container.put(batch, x / 2 if x.is_floating_point() else (x + 1) % 8)
    return _plain(loss, container, like, model, batch)


def _clamped(loss: Loss, container: Container, like: Fields, model: nn.Module, batch: Any) -> Tensor:
    """Overwrites the inputs, with the same result if it does so again."""
    container.unpack(batch, like)["x"].clamp_(-1, 5)
    return _plain(loss, container, like, model, batch)


def _halved(loss: Loss, container: Container, like: Fields, model: nn.Module, batch: Any) -> Tensor:
    """Overwrites the inputs, with another result if it does so again."""
    x = container.unpack(batch, like)["x"]
    if x.is_floating_point():
        x.mul_(0.5)
    else:
        x.add_(1).remainder_(8)
    return _plain(loss, container, like, model, batch)


def _is_view(container: Container) -> bool:
    return container.name != "one tensor"  # whose tokens are copies


HABITS: Mapping[str, Habit] = {
    "plain": Habit(_plain, 40),
    "weighted": Habit(_weighted, 15, is_weighted=True),
    "penalized": Habit(_penalized, 9),
    "tolist": Habit(_listed, 8),
    "item": Habit(_item, 6, is_weighted=True),
    "branch": Habit(_branch, 8),
    "pop": Habit(_popped, 5, lambda container: container.pop is not None, changes=True),
    "replaced inputs": Habit(_replaced, 4, lambda container: container.put is not None, changes=True),
    "clamped in place": Habit(_clamped, 3, _is_view, changes=True),
    "halved in place": Habit(_halved, 2, _is_view, changes=True),
}


def loss_function(loss: Loss, habit: Habit, container: Container, like: Fields) -> Callable[[nn.Module, Any], Tensor]:
    """The loss as an analysis takes it."""
    return lambda model, batch: habit.compute(loss, container, like, model, batch)

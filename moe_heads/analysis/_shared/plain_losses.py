"""Margin losses of torch as sums and products, which have a second derivative."""

import torch
from torch import Tensor

__all__ = ["plain_multi_margin_loss", "plain_multilabel_margin_loss"]

_MEAN, _SUM = 1, 2
"""Numbers of the reductions in torch."""


def plain_multi_margin_loss(
    x: Tensor,
    target: Tensor,
    p: float = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    reduction: int = _MEAN,
) -> Tensor:
    r"""Return the sum of :math:`w_y \max(0, m - x_y + x_i)^p / C` over :math:`i \ne y`, reduced over the samples."""
    _check_targets(target, x.shape[-1], lowest=0)
    scores, labels = (x if x.dim() == 2 else x.reshape(1, -1)), target.reshape(-1)
    own = scores.gather(1, labels[:, None])
    distances = (margin - own + scores).relu().pow(p)
    if weight is not None:
        distances = distances * weight[labels][:, None]
    distances = distances.masked_fill(_is_marked(labels[:, None], scores), 0)
    losses = distances.sum(1) / scores.shape[1]
    return _reduced(losses if x.dim() == 2 else losses.reshape(()), reduction)


def plain_multilabel_margin_loss(x: Tensor, target: Tensor, reduction: int = _MEAN) -> Tensor:
    r"""Return the sum of :math:`\max(0, 1 - x_y + x_i) / C` over labels y and other classes i, reduced over samples."""
    _check_targets(target, x.shape[-1], lowest=-1)
    scores, labels = (part if part.dim() == 2 else part.reshape(1, -1) for part in (x, target))
    # labels after the first -1 do not count
    is_label = (labels >= 0).cumprod(1).bool()
    labels = labels.clamp_min(0)
    own = scores.gather(1, labels)
    counts = torch.zeros_like(scores, dtype=torch.long).scatter_add(1, labels, is_label.long())
    is_pair = is_label[:, :, None] & (counts == 0)[:, None, :]
    distances = (1 - own[:, :, None] + scores[:, None, :]).relu().masked_fill(~is_pair, 0)
    losses = distances.sum((1, 2)) / scores.shape[1]
    return _reduced(losses if x.dim() == 2 else losses.reshape(()), reduction)


def _check_targets(target: Tensor, num_classes: int, lowest: int) -> None:
    if bool(((target < lowest) | (target >= num_classes)).any()):
        raise ValueError(f"target: expected classes from {lowest} to {num_classes - 1}, got others. Check the labels.")


def _is_marked(labels: Tensor, scores: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, labels, True)


def _reduced(losses: Tensor, reduction: int) -> Tensor:
    if reduction == _MEAN:
        return losses.mean()
    return losses.sum() if reduction == _SUM else losses

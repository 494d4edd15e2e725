"""Preconditioner of an adaptive optimizer from its state, and the stability threshold in its metric."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["check_preconditioner", "preconditioned_threshold", "preconditioner_of"]


def preconditioner_of(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    r"""Return the diagonal :math:`D = \sqrt{\hat v} + \epsilon` by which an optimizer divides its steps, by name.

    Args:
        optimizer: A `torch.optim.Adam`, `torch.optim.AdamW` or `torch.optim.RMSprop`.
        model: The model, for the names of the parameters.

    Returns:
        Copies for the parameters that require a gradient and have made a step. The bias correction of Adam, the largest
        second moments of ``amsgrad`` and the centered moments of RMSprop are those of the last step.

    Raises:
        ValueError: If it is another optimizer, or has made no step.
    """
    check_preconditioner(optimizer)
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    found = {
        names[id(p)]: _diagonal(group, state)
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) in names and (state := optimizer.state.get(p))
    }
    if not found:
        raise ValueError(
            f"optimizer: expected the state of at least one step, got none in {type(optimizer).__name__}. Analyze after"
            " the first step."
        )
    return found


def check_preconditioner(optimizer: Optimizer) -> None:
    """Check that an optimizer has a diagonal preconditioner that is known.

    Raises:
        ValueError: If it is not Adam, AdamW or RMSprop.
    """
    if type(optimizer) not in {torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop}:
        raise ValueError(
            f"optimizer: expected Adam, AdamW or RMSprop of torch.optim for a preconditioner, got"
            f" {type(optimizer).__name__}. Use critical_sharpness, which works with any update."
        )


def preconditioned_threshold(optimizer: Optimizer) -> float | None:
    r"""Return the :math:`\lambda_{\max}(D^{-1/2} H D^{-1/2})` above which steps with a fixed D diverge on a quadratic.

    .. math:: \frac{2 (1 + \beta_1)}{(1 - \beta_1) \eta}\ \text{for Adam}, \qquad
        \frac{2 (1 + \mu)}{\eta}\ \text{for RMSprop with momentum}\ \mu

    The first is 38 / η for β₁ = 0.9 (Cohen et al., arXiv 2207.14484). The decoupled decay d of AdamW moves each
    parameter by η d of its size without a gradient, which replaces 2 / η by 2 / η - d.

    Returns:
        The threshold at the current learning rate, without the correction of the first moment in the first steps. None
        for other optimizers, groups that differ, an ascent, or a decay that is added to the gradient.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.sharpness.preconditioner import preconditioned_threshold
        >>> round(preconditioned_threshold(torch.optim.Adam(torch.nn.Linear(1, 1).parameters(), lr=0.5)), 6)
        76.0
    """
    try:
        check_preconditioner(optimizer)
    except ValueError:
        return None
    found = {_threshold(group) for group in optimizer.param_groups}
    return found.pop() if len(found) == 1 else None


def _threshold(group: Mapping[str, Any]) -> float | None:
    rate, decay = float(group["lr"]), float(group["weight_decay"])
    is_decoupled = bool(group.get("decoupled_weight_decay"))
    if rate <= 0 or group["maximize"] or (decay and not is_decoupled):
        return None
    if "betas" not in group:
        return 2 * (1 + float(group["momentum"])) / rate
    beta = float(group["betas"][0])
    return (2 / rate - decay) * (1 + beta) / (1 - beta)


@torch.no_grad()
def _diagonal(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    square: Tensor
    if "betas" in group:
        correction = 1 - float(group["betas"][1]) ** float(state["step"])
        square = (state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]) / correction
    else:
        square = state["square_avg"]
        if group["centered"]:
            square = (square - state["grad_avg"].square()).clamp_min(0)
    return square.sqrt().add_(float(group["eps"]))

"""Sharpness above which the steps of an optimizer are unstable (Cohen et al., arXiv 2103.00065)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["stability_threshold"]


def stability_threshold(optimizers: Iterable[Optimizer]) -> float | None:
    r"""Return the :math:`\lambda_{\max}` above which gradient descent on a quadratic diverges.

    .. math:: \frac{2}{\eta}\ \text{for SGD}, \qquad \frac{2 (1 + \beta)}{\eta}\ \text{with momentum}, \qquad
        \frac{2 (1 + \beta)}{\eta (1 + 2 \beta)}\ \text{with Nesterov's}

    (appendix B of Cohen et al.), minus the weight decay, which adds to every eigenvalue. The threshold holds for full
    batches. The noise of small batches keeps the sharpness below it.

    Args:
        optimizers: The optimizers of a run.

    Returns:
        The threshold at the current learning rate. None unless there is one `torch.optim.SGD` without dampening whose
        parameter groups agree, since other methods move in another metric.

    Example:
        >>> import torch
        >>> from moe_heads.callbacks._stability import stability_threshold
        >>> stability_threshold([torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=0.125, momentum=0.5)])
        24.0
    """
    listed = list(optimizers)
    if len(listed) != 1 or type(listed[0]) is not torch.optim.SGD:
        return None
    found = {_threshold(group) for group in listed[0].param_groups}
    return found.pop() if len(found) == 1 else None


def _threshold(group: Mapping[str, Any]) -> float | None:
    rate, momentum = float(group["lr"]), float(group["momentum"])
    if rate <= 0 or group["dampening"] or group["maximize"]:
        return None
    threshold = 2 * (1 + momentum) / rate
    if group["nesterov"]:
        threshold /= 1 + 2 * momentum
    return threshold - float(group["weight_decay"])

"""What an analysis evaluates of any LightningModule: its loss, or its forward pass."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from moe_heads.callbacks.functional.common.batches import Batch, ForwardFn, LossFn, batch_size, cut, is_divisible
from moe_heads.callbacks.functional.common.environment import device_of
from moe_heads.callbacks.functional.common.microbatches import Microbatches
from moe_heads.callbacks.functional.common.monitor import Monitor
from moe_heads.callbacks.functional.common.preserve import analysis_mode

__all__ = ["check_forward", "check_initialised", "draws_random_numbers", "loss_of", "warn_of_a_sum"]

# What the order of a sum on several threads or on a GPU may change in single precision.
_ROUNDING = 1e-5

# Enough to notice a state that is carried on.
_FEW_SAMPLES = 32

_REMEDY = "Pass loss_fn=lambda model, batch: ... to the callback, or give the module a method analysis_loss(batch)."


def loss_of(model: nn.Module, loss_fn: LossFn | None) -> LossFn:
    """The loss of a module, in the order of preference.

    1. ``loss_fn(pl_module, batch)``, the callback's argument;
    2. the module's own ``analysis_loss(batch)``;
    3. what ``training_step`` returns, a tensor or a dict with "loss", under automatic optimisation.

    Args:
        model: The module.
        loss_fn: The callback's argument.

    Returns:
        ``loss_fn(model, batch) -> scalar``.

    Raises:
        MisconfigurationException: If the module offers neither of the first two, and is no LightningModule, optimises
            by hand (calling its training step would change the weights), or takes its batches from an iterator.
    """
    if loss_fn is not None:
        return loss_fn
    if hasattr(model, "analysis_loss"):
        return lambda model, batch: cast(Any, model).analysis_loss(batch)
    name = type(model).__name__
    if not isinstance(model, LightningModule) or not is_overridden("training_step", model):
        raise MisconfigurationException(f"{name} has no training_step to take the loss from. {_REMEDY}")
    if not model.automatic_optimization:
        raise MisconfigurationException(
            f"{name} optimises by hand, so its training_step would change the weights. {_REMEDY}"
        )
    if is_param_in_hook_signature(model.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            f"{name}.training_step takes its batches from dataloader_iter: it has no loss of a given batch. {_REMEDY}"
        )
    return _training_loss


def check_initialised(model: nn.Module) -> None:
    """Refuse a model with lazy layers that no batch has gone through yet.

    Raises:
        MisconfigurationException: If a parameter or buffer has no values.
    """
    kinds = (nn.UninitializedParameter, nn.UninitializedBuffer)
    lazy = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if isinstance(t, kinds)]
    if lazy:
        raise MisconfigurationException(
            f"{type(model).__name__}: {lazy[0]} is lazy and has no values yet. Run one forward pass first: train at"
            " least one batch, or call the module in configure_model."
        )


def draws_random_numbers(model: nn.Module, loss_fn: LossFn, batch: Batch, name: str) -> bool:
    """Evaluate the loss of a batch twice from the same random numbers, and once from others.

    It is said when the first two differ, as by a hidden state that is carried on, or by random numbers that do not come
    from torch: then there is no function of the weights whose curvature or landscape could be known.

    Returns:
        Whether the loss depends on torch's random numbers.
    """
    few = cut(batch, 0, _FEW_SAMPLES) if is_divisible(batch) else batch
    data = Microbatches([few], device_of(model), Monitor())
    with analysis_mode(model):  # with gradients: a loss may take some itself
        losses = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            losses.append(next(loss for _, loss in data.evaluate(lambda index, part: loss_fn(model, part))))
    if not all(isinstance(loss, Tensor) and loss.numel() == 1 for loss in losses):
        return False  # told by the analysis itself, with the same words as without a Trainer
    first, second, third = (float(loss.detach()) for loss in losses)
    if _differ(first, second):
        rank_zero_warn(
            f"{name}: the loss of one batch was {first:.8g}, and {second:.8g} on a repeat with the same weights and"
            " random numbers. The module carries a state from one batch to the next, or draws numbers outside torch:"
            f" the result is a mixture. {_REMEDY}"
        )
    return not _differ(first, second) and _differ(second, third)


def warn_of_a_sum(model: nn.Module, loss_fn: LossFn, batch: Batch, name: str) -> None:
    """Say when the loss of a batch is the sum over its samples: every result would grow with the size of the batches.

    A loss that is a mean over the samples has, for two halves of equal size, the mean of their losses.
    """
    few = cut(batch, 0, _FEW_SAMPLES) if is_divisible(batch) else batch
    half = batch_size(few) // 2
    if not is_divisible(few) or half == 0:
        return
    parts = [cut(few, 0, 2 * half), cut(few, 0, half), cut(few, half, 2 * half)]
    scalars = []
    with analysis_mode(model):
        for part in parts:
            torch.manual_seed(0)
            try:
                loss = loss_fn(model, part)
            except (
                Exception
            ):  # a module may take batches of one size only; what else fails, fails in the analysis again
                return
            scalars += [float(loss.detach())] if isinstance(loss, Tensor) and loss.numel() == 1 else []
    if len(scalars) < len(parts):
        return  # told by the analysis itself
    whole, first, second = scalars
    if not _differ(whole, first + second) and _differ(whole, (first + second) / 2):
        rank_zero_warn(
            f"{name}: the loss of {2 * half} samples is the sum of the losses of its halves, {first:.5g} and"
            f" {second:.5g}. Expected their mean: the results are those of a sum over the samples of a batch. Give the"
            f" loss reduction='mean'. {_REMEDY}"
        )


def check_forward(callback: Callback, pl_module: nn.Module, forward_fn: ForwardFn | None) -> None:
    """Refuse a module that cannot be called, before training.

    Raises:
        MisconfigurationException: If the module has no ``forward`` and no ``forward_fn`` takes its place.
    """
    if forward_fn is None and type(pl_module).forward in {LightningModule.forward, nn.Module.forward}:
        raise MisconfigurationException(
            f"{type(callback).__name__} calls the module, and {type(pl_module).__name__} has no forward. Define it, or"
            " pass forward_fn=lambda module, batch: ... to the callback."
        )


def _differ(first: float, second: float) -> bool:
    return abs(first - second) > _ROUNDING * max(abs(first), abs(second))


def _training_loss(model: nn.Module, batch: Batch) -> Tensor:
    step = cast(LightningModule, model).training_step
    # the Trainer's own rule: a second argument, whatever its name, is the index of the batch
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    output = step(batch, 0) if takes_index else step(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"{type(model).__name__}.training_step: expected a tensor or a dict with 'loss'; got {type(loss).__name__}."
            f" {_REMEDY}"
        )
    return loss

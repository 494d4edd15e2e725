"""Loss and forward pass of any LightningModule, and checks of them."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.batches import Batch, ForwardFn, LossFn
from moe_heads.analysis._shared.copies import on_copies
from moe_heads.analysis._shared.environment import device_of
from moe_heads.analysis._shared.graph_on_demand import GraphOnDemand
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis._shared.scalar import is_scalar
from moe_heads.callbacks._shared.lightning_packages import under_both_names
from moe_heads.callbacks._shared.trainer_access import is_overridden

__all__ = ["check_forward", "check_initialized", "draws_random_numbers", "loss_of", "of_batch"]

# Relative change of a loss in single precision by another summation order on several threads or on a GPU.
_ROUNDING = 1e-5

_REMEDY = (
    "Pass loss_fn=lambda model, batch: ... to the callback or the TrainingMonitor, or give the module a method"
    " analysis_loss(batch)."
)


def loss_of(model: nn.Module, loss_fn: LossFn | None) -> LossFn:
    """Return the loss function of a module, in this order of preference.

    1. ``loss_fn(pl_module, batch)``, the callback's argument; 2. the module's own ``analysis_loss(batch)``; 3. the
    output of ``training_step``, a tensor or a dict with "loss", under automatic optimization.

    Args:
        model: The module.
        loss_fn: The callback's argument.

    Returns:
        ``loss_fn(model, batch) -> scalar``.

    Raises:
        MisconfigurationException: If there is neither of the first two, and the module is not a LightningModule, uses
            manual optimization (its training step would change the weights), or takes its batches from an iterator.
    """
    if loss_fn is not None:
        return loss_fn
    if hasattr(model, "analysis_loss"):
        return lambda model, batch: cast(Any, model).analysis_loss(batch)
    name = type(model).__name__
    if not is_overridden("training_step", model):
        raise MisconfigurationException(f"{name}: expected a training_step that returns the loss, got none. {_REMEDY}")
    module = cast(LightningModule, model)
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{name}: expected automatic optimization, got manual optimization, whose training_step would change the"
            f" weights. {_REMEDY}"
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            f"{name}.training_step: expected a batch as argument, got dataloader_iter, with which it has no loss of a"
            f" given batch. {_REMEDY}"
        )
    return _training_loss


def check_initialized(model: nn.Module) -> None:
    """Check that no lazy layer is uninitialized.

    Raises:
        MisconfigurationException: If a parameter or buffer is uninitialized.
    """
    kinds = (nn.UninitializedParameter, nn.UninitializedBuffer)
    lazy = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if isinstance(t, kinds)]
    if lazy:
        raise MisconfigurationException(
            f"{type(model).__name__}: expected initialized parameters, got a lazy {lazy[0]}. Run one forward pass"
            " first: train at least one batch, or call the module in configure_model."
        )


def draws_random_numbers(model: nn.Module, loss_fn: LossFn, batches: Sequence[Batch], name: str) -> bool:
    """Evaluate the loss of the first batch twice with the same random numbers, and once with different ones.

    Warns if the first two losses differ, for example because of a hidden state or of random numbers from outside torch.
    Then the loss is not a function of the weights, and its curvature and landscape are not defined.

    The batch is not cut, since a module may need whole batches.

    Returns:
        Whether the loss depends on torch's random numbers.
    """
    data, graph = Microbatches(batches, device_of(model), Progress()), GraphOnDemand()
    loss_fn = on_copies(loss_fn)
    with analysis_mode(model):
        losses = []
        for seed in (0, 0, 1):

            def evaluate(batch: Batch, seed: int = seed) -> Any:
                torch.manual_seed(seed)
                return loss_fn(model, batch)

            found = data.evaluate(lambda index, batch: graph(lambda: evaluate(batch)), copies=False)
            losses.append(next(loss for _, loss in found))
    if not all(map(is_scalar, losses)):
        return False  # the analysis itself raises an error, the same as without a Trainer
    first, second, third = (float(loss.detach()) for loss in losses)
    if _differ(first, second):
        rank_zero_warn(
            f"{name}: the loss of one batch was {first:.8g}, and {second:.8g} on a repeat with the same weights and"
            " random numbers. The module carries a state between batches or draws random numbers outside torch, so the"
            f" result mixes different losses. {_REMEDY}"
        )
    return not _differ(first, second) and _differ(second, third)


def check_forward(owner: str, module: nn.Module, forward_fn: ForwardFn | None) -> None:
    """Check before training that the module can be called.

    Raises:
        MisconfigurationException: If the module has no ``forward`` and no ``forward_fn`` takes its place.
    """
    without: list[Any] = [nn.Module.forward, *(cls.forward for cls in under_both_names(LightningModule))]
    if forward_fn is None and type(module).forward in without:
        raise MisconfigurationException(
            f"{owner}: expected a module with a forward method, got {type(module).__name__}"
            " without one. Define forward, or pass forward_fn=lambda module, batch: ... to the callback."
        )


def _differ(first: float, second: float) -> bool:
    return abs(first - second) > _ROUNDING * max(abs(first), abs(second))


def of_batch(loss_fn: LossFn, index: int) -> LossFn:
    """Return a loss of `loss_of` for the batch of an index in the training, which a training step may use."""
    return partial(_training_loss, index=index) if loss_fn is _training_loss else loss_fn


def _training_loss(model: nn.Module, batch: Batch, index: int = 0) -> Tensor:
    step = cast(LightningModule, model).training_step
    # the Trainer's own rule: a second argument of any name is the index of the batch
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    output = step(batch, index) if takes_index else step(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        got = f"a dict with {sorted(map(str, output))}" if isinstance(output, Mapping) else type(output).__name__
        raise MisconfigurationException(
            f"{type(model).__name__}.training_step: expected a tensor or a dict with 'loss', got {got}. {_REMEDY}"
        )
    return loss

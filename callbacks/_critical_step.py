"""Batches, random numbers and parameters of one optimizer step, and the critical sharpness of its update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_heads.analysis._shared.batches import Batch, LossFn, cut, is_divisible, num_rows
from moe_heads.analysis._shared.copies import own_copy
from moe_heads.analysis._shared.generators import generator_states, restore_generators
from moe_heads.analysis._shared.graph_on_demand import GraphOnDemand
from moe_heads.analysis._shared.parameter_path import ParameterPath
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.scalar import checked_scalar
from moe_heads.analysis._shared.state import Original, preserved, write_back
from moe_heads.analysis.critical_sharpness.function import is_coarse
from moe_heads.analysis.critical_sharpness.line import critical_sharpness_along
from moe_heads.analysis.critical_sharpness.result import CriticalSharpnessResult
from moe_heads.analysis.critical_sharpness.update import (
    Values,
    check_has_update,
    learning_rate_of,
    made_update,
    parameter_values,
)
from moe_heads.callbacks._shared.evaluation import of_batch
from moe_heads.callbacks._shared.execution_context import ExecutionContext
from moe_heads.callbacks._shared.trainer_access import muted

__all__ = ["RecordedStep", "Search", "chosen_optimizer"]


@dataclass(frozen=True)
class Search:
    """Options of the search for the rise.

    Attributes:
        fraction: Share of each batch that is evaluated.
        tolerance: See `moe_heads.analysis.critical_sharpness`.
        max_passes: Likewise.
        smallest_step: Likewise.
        largest_step: Likewise.
    """

    fraction: float
    tolerance: float
    max_passes: int
    smallest_step: float
    largest_step: float


@dataclass
class RecordedStep:
    """The batches since the last optimizer step, and the parameters before the next one.

    Attributes:
        before: Parameters of the optimizer before its step, by name; None if it has not come yet.
        learning_rate: Learning rate of the step; None if the parameter groups differ.
        batches: Each batch, the states of the random generators at its beginning, and its index in the epoch.
    """

    before: Values | None = None
    learning_rate: float | None = None
    batches: list[tuple[Batch, tuple[Any, ...], int]] = field(default_factory=list)
    _states: tuple[Any, ...] = ()

    def begin_batch(self) -> None:
        """Keep the states of the random generators."""
        self._states = generator_states()

    def before_step(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Keep the parameters and the learning rate."""
        self.before, self.learning_rate = parameter_values(optimizer, model), learning_rate_of(optimizer)

    def end_batch(self, batch: Batch, index: int) -> None:
        """Keep the batch with its index in the epoch.

        Raises:
            ValueError: If there is none.
        """
        if batch is None:
            raise ValueError("batch: expected the training batch, got None. Call monitor.step(model, batch).")
        self.batches.append((batch, self._states, index))

    def measure(
        self, context: ExecutionContext, model: nn.Module, loss_fn: LossFn, search: Search, start: float, ranks: Ranks
    ) -> CriticalSharpnessResult:
        """Return the critical sharpness of the step that was made, and leave everything as it is.

        Args:
            context: Context of the training.
            model: The model after the step.
            loss_fn: The loss.
            search: Options of the search.
            start: First multiple of the update.
            ranks: The processes, each with its batches.
        """
        assert self.before is not None
        parts = [(_part(batch, search.fraction), states, index) for batch, states, index in self.batches]
        graph, resolution, num_samples = GraphOnDemand(), 0.0, sum(num_rows(batch) for batch, *_ in parts)
        # the user's compiled functions would get further graphs, for passes without gradients
        uncompiled = torch.compiler.set_stance("force_eager")
        with torch.inference_mode(False), uncompiled, muted(model), preserved(model) as original:
            path = ParameterPath(model, [made_update(model, self.before)], _starts(model, self.before, original))

            def batch_loss(batch: Batch, states: tuple[Any, ...], index: int) -> Tensor:
                restore_generators(states)
                with context.forward_context():
                    loss = of_batch(loss_fn, index)(model, own_copy(batch))
                    return checked_scalar(loss, "the mean loss of the batch")

            def loss_at(step: float) -> float:
                nonlocal resolution
                with ranks.synchronized():
                    path.go([step])
                    total = 0.0
                    for part in parts:
                        _put_back_buffers(model, original)
                        loss = graph(partial(batch_loss, *part))
                        resolution = max(resolution, torch.finfo(loss.dtype).eps)
                        total += float(loss.detach()) / len(parts)
                # the gradient of the step is the mean over the processes
                return float(ranks.all_reduce(torch.tensor([total], dtype=torch.float64))) / ranks.size

            with context.forward_context():
                coarse = is_coarse(model)
            return critical_sharpness_along(
                loss_at,
                learning_rate=self.learning_rate or 1.0,
                num_samples=ranks.sum(num_samples),
                resolution=lambda: resolution,
                is_coarse=coarse,
                start=start,
                tolerance=search.tolerance,
                max_passes=search.max_passes,
                smallest_step=search.smallest_step,
                largest_step=search.largest_step,
            )


def chosen_optimizer(owner: str, optimizers: Sequence[Optimizer], index: int | None) -> Optimizer:
    """Return the optimizer whose update is followed.

    Args:
        owner: Name of the callback.
        optimizers: The optimizers of the training.
        index: Number of the optimizer, None if there is one.

    Raises:
        MisconfigurationException: If there is none, there are several and none is chosen, or it has no update.
    """
    if not optimizers:
        raise MisconfigurationException(
            f"{owner}: expected a training with a known optimizer, got none. Pass it: monitor.start(model, optimizer)."
        )
    if index is None and len(optimizers) > 1:
        raise MisconfigurationException(
            f"{owner}: expected one optimizer, got {len(optimizers)}. Choose one of them with optimizer=0 to"
            f" optimizer={len(optimizers) - 1}, and pass the loss that it minimizes as loss_fn."
        )
    if index is not None and index >= len(optimizers):
        raise MisconfigurationException(
            f"{owner}: expected optimizer=0 to {len(optimizers) - 1}, got {index}: there are {len(optimizers)}"
            " optimizers. Choose one of them."
        )
    optimizer = optimizers[index or 0]
    try:
        check_has_update(optimizer)
    except ValueError as error:
        raise MisconfigurationException(f"{owner}: {error}") from error
    return optimizer


def _starts(model: nn.Module, before: Values, original: Original) -> Original:
    """Return what gives the values of a tensor before the step."""
    starts = {id(p): before[name] for name, p in model.named_parameters() if name in before}
    # the path needs no copy of a sharded parameter, whose local part it would take
    return lambda tensor: starts[id(tensor)] if id(tensor) in starts else original(tensor)


def _put_back_buffers(model: nn.Module, original: Original) -> None:
    """Put back what a pass in training mode changes, so that each pass evaluates the same function."""
    for buffer in model.buffers():
        write_back(buffer, original(buffer))


def _part(batch: Batch, fraction: float) -> Batch:
    if fraction == 1 or not is_divisible(batch):
        return batch
    return cut(batch, 0, math.ceil(fraction * num_rows(batch)))

"""Analyses in a training loop of PyTorch or Lightning Fabric, without a Trainer."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.shards import CHECKPOINT_REMEDY, is_sharded
from moe_heads.callbacks._shared.analysis_group import AnalysisGroup
from moe_heads.callbacks._shared.loggers import loggers_of
from moe_heads.callbacks._shared.loop_context import LoopContext
from moe_heads.callbacks._shared.trainer_access import Split, inside_fabric
from moe_heads.callbacks._shared.training_analysis import TrainingAnalysis
from moe_heads.callbacks._shared.wrapped_models import unwrapped
from moe_heads.routing import named_routers

__all__ = ["TrainingMonitor"]

_BEST = "without a Trainer. Load the best checkpoint into the model before monitor.end(model)."


class TrainingMonitor:
    """Analyses in a training loop of your own, or of Lightning Fabric: the same numbers as under a Trainer.

    Call `start` before the first batch, `step` after every batch, `end_epoch` after every epoch, and `end` after the
    training. Analyses with ``every_n_train_steps`` and ``every_n_epochs`` run in `step` and `end_epoch`, and all run in
    `end`. The model, its gradients, the optimizer and all random generators are afterwards bit for bit what they were.
    The expert utilization counts the passes in training mode with gradients since the last `step`. A validation in
    evaluation mode or under ``no_grad`` does not count.

    Under DDP (also that of Fabric), call the methods in every process. The samples are divided among the processes, and
    rank zero writes. The model may be wrapped by DDP, Fabric or torch.compile.

    Args:
        analyses: The callbacks of this package, with the same options as in a Trainer.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch, for analyses without a
            ``loss_fn`` of their own. A module with ``analysis_loss(batch)`` and a LightningModule need none.
        writer: Where to write: a `torch.utils.tensorboard.SummaryWriter`, a W&B run, a logger of Lightning or Fabric, a
            list of these, or None, the default.
        device: Device of the analyses; by default that of the model.

    Attributes:
        metrics: The last value of every number, by key.
        num_steps: Number of optimizer steps so far, the step of all points.

    Raises:
        ValueError: If there is no analysis, one is not of this package, two have the same name, or the writer cannot be
            used.

    Example:
        >>> import torch
        >>> from moe_heads.callbacks import SharpnessCallback, TrainingMonitor
        >>> model, batch = torch.nn.Linear(4, 3), (torch.randn(32, 4), torch.randint(3, (32,)))
        >>> def loss_fn(model, batch):
        ...     return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = TrainingMonitor([SharpnessCallback(splits=["train"])], loss_fn=loss_fn)
        >>> monitor.start(model, optimizer)
        >>> for _ in range(3):
        ...     loss_fn(model, batch).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     monitor.step(model, batch)
        >>> monitor.end(model, train=[batch])["sharpness"]["train"].converged
        True
    """

    def __init__(
        self,
        analyses: Sequence[TrainingAnalysis],
        *,
        loss_fn: LossFn | None = None,
        writer: Any = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._group = AnalysisGroup(analyses, _BEST)
        if loss_fn is not None and not callable(loss_fn):
            raise ValueError(f"loss_fn: expected loss_fn(model, batch) -> scalar, got {loss_fn!r}.")
        self._context = LoopContext(type(self).__name__, self._group.analyses, loggers_of(writer), loss_fn, device)
        self._loaders: dict[Split, Any] = {}
        self._kept: Mapping[str, Any] = {}
        self._model: nn.Module | None = None
        self._hooks = ExitStack()
        self._has_batches = self._has_ended = False

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of every number, by key."""
        return self._context.metrics

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps so far."""
        return self._context.step

    def start(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        *,
        train: Any = None,
        val: Any = None,
        test: Any = None,
    ) -> None:
        """Begin a training, before its first batch.

        Args:
            model: The model.
            optimizer: The optimizer or optimizers. With them, only batches with an optimizer step count as a step
                (gradient accumulation), and the stability threshold of SGD and the gradient norms of routers are
                recorded.
            train: Loader of the training data, or a list of batches, for analyses during and after the training; by
                default the batch of the step.
            val: Validation data.
            test: Test data.

        Raises:
            ValueError: If an option of an analysis does not fit the model.
            MisconfigurationException: If an analysis needs a loss and there is none, or the parameters are sharded.
        """
        self.close()
        context = self._context
        module, context.group = unwrapped(model)
        if is_sharded(module):
            raise MisconfigurationException(
                f"{context.owner}: expected a model that is whole in every process, got one with parameters that are"
                f" divided among processes. {CHECKPOINT_REMEDY}, or train with Lightning's ModelParallelStrategy."
            )
        context.step = context.epoch = 0
        context.metrics.clear()
        context.batch = None
        context.optimizers = _optimizers(optimizer)
        self._loaders = {}
        self._give(train, val, test)
        kept, self._kept = self._kept, {}
        self._group.begin(context, module, kept)
        self._model, self._has_ended = module, False
        for each in context.optimizers:
            self._enter(each.register_step_pre_hook(self._before_step))
            self._enter(each.register_step_post_hook(self._after_step))
        self._begin_batch()

    def step(self, model: nn.Module, batch: Batch = None) -> None:
        """End a training batch, after its optimizer step.

        Without a `start` before, the training begins here, with a warning if the expert utilization lacks this batch.

        Args:
            model: The model.
            batch: The batch. It has the mask of padded tokens and the labels for the expert utilization. Analyses use
                it as training data if `start` was given none.
        """
        if self._model is None:
            self._start_late(model)
        module, context = self._same(model), self._context
        context.batch = batch
        if not context.optimizers:
            context.step += 1
        self._group.end_batch(context, module, batch)
        self._has_batches = True
        self._begin_batch()

    def end_epoch(self, model: nn.Module) -> None:
        """End a training epoch.

        Args:
            model: The model.
        """
        if self._model is None:
            self._start_late(model)
        self._group.end_epoch(self._context, self._same(model))
        self._has_batches = False
        self._begin_batch()

    def end(
        self, model: nn.Module, *, train: Any = None, val: Any = None, test: Any = None
    ) -> dict[str, dict[Split, Any]]:
        """End the training and analyze the trained model.

        Batches after the last `end_epoch` count as an epoch.

        Args:
            model: The model.
            train: Loader of the training data, or a list of batches; by default that of `start`.
            val: Validation data, likewise.
            test: Test data, likewise.

        Returns:
            The results by name of the analysis and split.
        """
        if self._model is None:
            self._start_late(model)
        if self._has_batches:
            self.end_epoch(model)
        module = self._same(model)
        self._give(train, val, test)
        try:
            return self._group.end(self._context, module)
        finally:
            self.close()
            self._has_ended = True

    def close(self) -> None:
        """Remove all hooks, also after an error of the loop. A training can `start` again."""
        self._hooks.close()
        self._group.close()
        self._model, self._has_batches = None, False

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed training needs, as tensors and plain data."""
        return self._group.state_dict(self._context)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue an earlier training with the next `start`.

        Args:
            state: State that `state_dict` returned.
        """
        self._kept = state

    def _start_late(self, model: nn.Module) -> None:
        """Start with the first batch already done, unless a training has just ended.

        Raises:
            ValueError: If a training has ended and no other one was started.
        """
        if self._has_ended:
            raise ValueError(
                "monitor: expected a training that runs, got one that has ended. Call monitor.start(model, optimizer)"
                " to begin another one, which forgets the results of this one."
            )
        self.start(model)
        if named_routers(unwrapped(model)[0]) and any(analysis.records_batches for analysis in self._group.analyses):
            rank_zero_warn(
                "TrainingMonitor: the expert utilization lacks the batches before the first monitor.step. Call"
                " monitor.start(model, optimizer) before the first batch."
            )

    def _give(self, train: Any, val: Any, test: Any) -> None:
        given: dict[Split, Any] = {"train": train, "val": val, "test": test}
        for split, loaders in given.items():
            if isinstance(loaders, tuple) and all(isinstance(part, Tensor) for part in loaders):
                raise ValueError(
                    f"{split}: expected a loader or a list of batches, got a tuple of tensors, which is one batch. Pass"
                    f" {split}=[batch]."
                )
            if loaders is not None:
                inner = inside_fabric(loaders)
                self._loaders[split] = loaders if inner is None else inner
        self._context.give(self._loaders)

    def _same(self, model: nn.Module) -> nn.Module:
        module = unwrapped(model)[0]
        if self._model is None or module is not self._model:
            raise ValueError(
                "model: expected the model that the training was started with, got another one. Call"
                " monitor.start(model, optimizer) for each training."
            )
        return module

    def _begin_batch(self) -> None:
        self._group.begin_batch(self._context)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._group.before_step(self._context, optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._context.step += 1

    def _enter(self, handle: RemovableHandle) -> None:
        self._hooks.callback(handle.remove)


def _optimizers(given: Optimizer | Iterable[Optimizer] | None) -> tuple[Optimizer, ...]:
    listed = () if given is None else tuple(given) if isinstance(given, (list, tuple)) else (given,)
    found = tuple(inside_fabric(each) or each for each in listed)
    for each in found:
        if not isinstance(each, Optimizer):
            raise ValueError(f"optimizer: expected a torch.optim.Optimizer or a list of them, got {each!r}.")
    return found

"""Analyses under the Trainer of Hugging Face transformers."""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from moe_heads.callbacks._shared.analysis_group import AnalysisGroup
from moe_heads.callbacks._shared.training_analysis import TrainingAnalysis

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    from moe_heads.callbacks._shared.transformers_access import (
        TensorBoardWriters,
        calling_trainer,
        model_of,
        reason_to_leave_out,
    )
    from moe_heads.callbacks._shared.transformers_context import TransformersContext
except ModuleNotFoundError as error:
    raise ImportError(
        "moe_heads.callbacks.hf: expected the package transformers, which is not installed. Run `pip install"
        " 'moe-heads[hf]'`."
    ) from error

__all__ = ["TransformersCallback"]

_BEST = (
    "under a Trainer of transformers. With TrainingArguments(load_best_model_at_end=True) the best weights are loaded"
    " before the analyses."
)

# Name of the file in a checkpoint of the Trainer.
_FILE = "moe_heads.pt"


class TransformersCallback(TrainerCallback):
    """Analyses under a `transformers.Trainer`, with its data, its loss and its loggers.

    All analyses run at the end of the training, in ``on_train_end``: with ``load_best_model_at_end``, on the best
    weights. Those with ``every_n_train_steps`` and ``every_n_epochs`` also run during it. Weights, gradients,
    optimizer, scheduler and random generators are afterwards bit for bit what they were.

    - Data: ``train_dataset`` is the split "train" and ``eval_dataset`` the split "val", which replaces "test". Of a
      dict of data sets, the first is used.
    - Loss: ``compute_loss`` of the Trainer, so ``compute_loss_func`` and label smoothing are used. A batch weighs as
      many labels as are not -100, after the shift of causal language models.
    - Numbers go to ``report_to`` and ``trainer.state.log_history``, below ``<analysis>/<split>/<quantity>``.
      TensorBoard and W&B add the prefix "train/", and also receive figures and tables.
    - Weights in half precision are analyzed in a float32 copy, frozen ones if it fits into half of the free memory.
      Autocast (``bf16=True``) is off, except in the inference timing.
    - Under DistributedDataParallel the samples are divided among the processes. A sharded model (FSDP, DeepSpeed,
      ``device_map`` on several devices) is left out, with a warning before the training.

    Args:
        analyses: The callbacks of this package, with the same options as in a Lightning Trainer.

    Attributes:
        metrics: The last value of every number, by key.

    Raises:
        ValueError: If there is no analysis, one is not of this package, two have the same name, or one has
            ``weights="best"``.

    Example:
        >>> from moe_heads.callbacks import SharpnessCallback
        >>> from moe_heads.callbacks.hf import TransformersCallback
        >>> TransformersCallback([SharpnessCallback(every_n_train_steps=100)]).metrics
        {}
    """

    def __init__(self, analyses: Sequence[TrainingAnalysis] | TrainingAnalysis) -> None:
        self._group = AnalysisGroup(analyses, _BEST)
        self._attached: Trainer | None = None
        self._context: TransformersContext | None = None
        self._model: nn.Module = nn.Identity()
        self._batch: dict[str, Tensor] | None = None
        self._writers: TensorBoardWriters | None = None
        self._hooks = ExitStack()
        self.metrics: dict[str, float] = {}

    def attach(self, trainer: Trainer) -> Self:
        """Add the callback to a Trainer, where the callback cannot find the Trainer that calls it.

        `Trainer(callbacks=[...])` and ``trainer.add_callback(...)`` need no such call.

        Args:
            trainer: The Trainer.
        """
        if not isinstance(trainer, Trainer):
            raise ValueError(f"trainer: expected a transformers.Trainer, got {type(trainer).__name__}.")
        self._attached = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
        found, resumed = calling_trainer(self)
        trainer = found or self._attached
        owner = type(self).__name__
        if trainer is None:
            raise MisconfigurationException(
                f"{owner}: expected a transformers.Trainer that calls this hook, found none. Call"
                " callback.attach(trainer) before the training."
            )
        if reason := reason_to_leave_out(trainer):
            rank_zero_warn(f"{owner}: {reason} The analyses are left out.")
            return
        context = TransformersContext(owner, self._group.analyses, trainer)
        context.step, context.epoch = state.global_step, int(state.epoch or 0)
        context.data.check_labels(self._group.analyses)
        model = model_of(trainer)
        context.say_precision()
        self._group.begin(context, model, _kept(state, args, resumed))
        self._context, self._model, self.metrics = context, model, context.metrics
        self._hooks.callback(model.register_forward_pre_hook(self._note_batch, with_kwargs=True).remove)
        self._group.begin_batch(context)

    @override
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # not in on_train_begin, where the callbacks after this one have no writer yet
        if self._context is not None and self._writers is None:
            self._writers = TensorBoardWriters(self._context.transformers_trainer)

    @override
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._context is not None:
            for optimizer in self._context.optimizers:
                self._group.before_step(self._context, optimizer)

    @override
    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end_batch(state)

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._end_batch(state)

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._context is not None:
            self._group.end_epoch(self._context, self._model)
            self._group.begin_batch(self._context)

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        # the runs of a search for hyperparameters have other folders
        if self._context is not None and self._context.is_rank_zero and folder.is_dir():
            torch.save(self._group.state_dict(self._context), folder / _FILE)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        context = self._context
        if context is None:
            return
        try:
            with nullcontext() if self._writers is None else self._writers.reopened():
                self._group.end(context, self._model)
        finally:
            self.close()

    def close(self) -> None:
        """Remove all hooks from the model. To be called if an error ended the training and none follows."""
        self._hooks.close()
        self._group.close()
        self._context = self._batch = self._writers = None
        self._model = nn.Identity()

    def _end_batch(self, state: TrainerState) -> None:
        context = self._context
        if context is None:
            return
        context.step, batch = state.global_step, self._batch
        self._batch = None
        self._group.end_batch(context, self._model, batch)
        self._group.begin_batch(context)

    def _note_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the batch of a training pass, whose padding and labels the expert utilization needs."""
        if module.training and torch.is_grad_enabled():
            self._batch = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}


def _kept(state: TrainerState, args: TrainingArguments, resumed: Path | None) -> dict[str, Any]:
    """Return the state of the analyses in the checkpoint that a training continues."""
    if state.global_step == 0:
        return {}
    folders = [*([] if resumed is None else [resumed]), Path(str(args.output_dir), f"checkpoint-{state.global_step}")]
    path = next((folder / _FILE for folder in folders if (folder / _FILE).is_file()), None)
    if path is None:
        rank_zero_warn(
            f"TransformersCallback: the checkpoint of step {state.global_step} was written without this callback."
            " Histories of the analyses begin at this step."
        )
        return {}
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return {**found, "step": state.global_step, "epoch": int(state.epoch or 0)}

"""Base class of the callbacks: the hooks in which an analysis runs, and the handling of errors and Ctrl-C."""

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Unpack, override

from moe_heads.callbacks._shared.options import AnalysisOptions, Stage
from moe_heads.callbacks._shared.reporting import log_hparams
from moe_heads.callbacks._shared.sharding import is_left_out
from moe_heads.callbacks._shared.trainer_context import TrainerContext
from moe_heads.callbacks._shared.training_analysis import TrainingAnalysis

__all__ = ["FitEndAnalysis"]


class FitEndAnalysis(TrainingAnalysis, Callback):
    """A callback that analyzes the trained model at the end of fit.

    It runs in ``on_fit_end``, after checkpoints are written and averaged weights are in place, so a failed analysis
    does not affect them. Without a fit, it runs at the end of ``trainer.validate`` and ``trainer.test`` on the
    evaluated split. It can also run every n epochs or optimizer steps during training, or without a Trainer by a call
    of `analyze`. Within one fit, the same weights are not analyzed twice on the same samples.

    Each split is analyzed separately. The results are stored in ``results``. The numbers go to
    ``trainer.callback_metrics`` and to every logger under ``<name>/<split>/<quantity>``. Figures, tables and meshes go
    to the loggers that support them. The last analysis of a trainer writes one row of TensorBoard's HPARAMS table.

    A subclass defines ``name``, `compute` and `report`, and class attributes: whether it needs a loss (``needs_loss``),
    the splits that replace one without data (``fallbacks``), whether a point of ``every_n_train_steps`` is a full
    analysis (``analyzes_steps``), and the work of several processes (``over_ranks``). With "same", every rank computes
    the same on all samples. With "share", each rank gets its part of the samples and passes ``inputs.ranks`` to a
    function that adds up. With "rank_zero", rank zero computes and the other ranks wait.

    Args:
        options: Options of all analyses; see `AnalysisOptions`.

    Attributes:
        results: Result by split.
        tracked: Metrics by split and epoch, recorded with ``every_n_epochs``.
        tracked_steps: Metrics by split and ``trainer.global_step``, recorded with ``every_n_train_steps``.
        is_tracking: Whether an analysis of ``every_n_epochs`` or ``every_n_train_steps`` is running.
        was_interrupted: Whether Ctrl-C ended a split of the last analysis. The run continues; code that should stop it
            can check this attribute and raise.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, **options: Unpack[AnalysisOptions]) -> None:
        self._check_names_of(options)
        super().__init__(**options)
        self._has_fitted = False

    @classmethod
    def _check_names_of(cls, options: AnalysisOptions) -> None:
        """Raise Python's error for an unknown keyword with the name of the callback, and the most similar option."""
        known = {*AnalysisOptions.__annotations__, *inspect.signature(cls).parameters} - {"options"}
        for name in options:
            if name not in known:
                similar = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {similar[0]!r}?" if similar else f" The options are {', '.join(sorted(known))}."
                raise TypeError(f"{cls.__name__}: got an unexpected option {name!r}.{hint}")

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        owner = type(self).__name__
        unsupported = self.unsupported_if_sharded()
        self.is_left_out = is_left_out(trainer, owner, self.weights, unsupported, self.on_error)
        if sum(other.name == self.name for other in self._context(trainer).analyses) > 1:
            raise MisconfigurationException(
                f"{owner}: expected one analysis for each name, got two with the name {self.name!r}. Give one of them"
                f" another name: {owner}(..., name='{self.name}_2')."
            )
        self.check_early(pl_module)
        if stage != "fit":
            return
        is_dry = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if "fit" in self._stages and self.weights == "best" and trainer.checkpoint_callback is None and not is_dry:
            raise MisconfigurationException(
                f"{owner}(weights='best'): expected a Trainer that writes checkpoints, got one without. Add a"
                " ModelCheckpoint(monitor=...), or analyze weights='last'."
            )
        self.check_loss(self._context(trainer), pl_module)
        self.begin_run(self._context(trainer), pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin_fit(self._context(trainer), pl_module)
        self._has_fitted = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # in on_fit_start, the Trainer has not yet restored the number of steps from a checkpoint
        self.begin_training(self._context(trainer))

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # not by state_dict: Lightning would warn when a run is resumed without this callback, and raise its own error
        # for two callbacks of the same class
        if kept := self.kept_in_checkpoints():
            checkpoint[self._checkpoint_key] = kept

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # an evaluation with the weights of another epoch must not overwrite the records of this fit
        is_wanted = trainer.state.fn == TrainerFn.FITTING or not self.kept_in_checkpoints()
        if self._checkpoint_key in checkpoint and is_wanted:
            self.restore(checkpoint[self._checkpoint_key])

    @property
    def _checkpoint_key(self) -> str:
        return f"moe_heads/{self.name}"

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.close()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.begin_batch(self._context(trainer), batch)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.before_backward()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.before_step(self._context(trainer), optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.end_batch(self._context(trainer), pl_module, batch)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end_epoch(self._context(trainer), pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end_training(self._context(trainer))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        context = self._context(trainer)
        if "fit" in self._stages:
            self.end_fit(context, pl_module)
        if self is context.analyses[-1]:
            log_hparams(trainer.loggers)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "validate" in self._stages and trainer.state.fn == TrainerFn.VALIDATING:
            self.results.pop("val", None)
            self.analyze_all(self._context(trainer), pl_module, ["val"], "last")

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "test" in self._stages:
            self.results.pop("test", None)
            self.analyze_all(self._context(trainer), pl_module, ["test"], "last")

    @property
    def _stages(self) -> Sequence[Stage]:
        if self.stages is not None:
            return self.stages
        return ("fit",) if self._has_fitted else ("fit", "validate", "test")

    def _context(self, trainer: Trainer) -> TrainerContext:
        return TrainerContext(trainer, type(self).__name__)

"""Base class of the callbacks: the hooks in which an analysis runs, and the handling of errors and Ctrl-C."""

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import Unpack, override

from moe_heads.callbacks._shared.analysis import Analysis, described
from moe_heads.callbacks._shared.evaluation import loss_of
from moe_heads.callbacks._shared.execution_context import TrainerContext
from moe_heads.callbacks._shared.options import AnalysisOptions, Stage, Weights
from moe_heads.callbacks._shared.reporting import log_hparams
from moe_heads.callbacks._shared.sharding import is_left_out
from moe_heads.callbacks._shared.step_interval import StepInterval
from moe_heads.callbacks._shared.stream_check import check_streams
from moe_heads.callbacks._shared.trainer_access import Split

__all__ = ["FitEndAnalysis"]


class FitEndAnalysis(Analysis, Callback):
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

    analyzes_steps: ClassVar[bool] = True

    def __init__(self, **options: Unpack[AnalysisOptions]) -> None:
        self._check_names_of(options)
        super().__init__(**options)
        self.tracked: dict[Split, dict[int, Mapping[str, float]]] = {}
        self.tracked_steps: dict[Split, dict[int, Mapping[str, float]]] = {}
        self._interval = None if self.every_n_train_steps is None else StepInterval(self.every_n_train_steps)
        self.is_tracking, self.was_interrupted = False, False
        self._has_fitted = self._is_left_out = False

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
        self._is_left_out = is_left_out(trainer, owner, self.weights, unsupported, self.on_error)
        if sum(other.name == self.name for other in _analyses_of(trainer)) > 1:
            raise MisconfigurationException(
                f"{owner}: expected one analysis for each name, got two with the name {self.name!r}. Give one of them"
                f" another name: {owner}(..., name='{self.name}_2')."
            )
        if stage != "fit":
            return
        at_the_end = "fit" in self._stages
        is_dry = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if at_the_end and self.weights == "best" and trainer.checkpoint_callback is None and not is_dry:
            raise MisconfigurationException(
                f"{owner}(weights='best'): expected a Trainer that writes checkpoints, got one without. Add a"
                " ModelCheckpoint(monitor=...), or analyze weights='last'."
            )
        if self.needs_loss and (at_the_end or self._runs_in_training):
            # a missing loss raises an error before training, not after it
            loss_of(pl_module, self.loss_fn)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # before any analysis of this fit: another analysis may read these results
        self.results, self.tracked, self.tracked_steps, self._known = {}, {}, {}, {}
        self._has_fitted = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._interval is not None:
            # in on_fit_start, the Trainer has not yet restored the number of steps from a checkpoint
            self._interval.start(trainer.global_step)
            if self.analyzes_steps and "train" in self.splits:
                check_streams(trainer, type(self).__name__)

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

    def kept_in_checkpoints(self) -> dict[str, Any]:
        """Return the state that a resumed fit needs, as tensors and plain data."""
        return {}

    def restore(self, kept: dict[str, Any]) -> None:
        """Restore the state that `kept_in_checkpoints` returned."""

    @property
    def _checkpoint_key(self) -> str:
        return f"moe_heads/{self.name}"

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # cached results are valid within one run: between two runs, anything may change
        self._known = {}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._interval is not None and self._interval.is_due(trainer.global_step):
            self.track_step(trainer, pl_module)

    def unsupported_if_sharded(self) -> str:
        """Return the reason why the analysis cannot run if the parameters are divided among processes, or "".

        An analysis that supports them returns "". It then runs the same forward passes on all ranks, and takes no
        gradients with torch.autograd.grad.
        """
        return f"{type(self).__name__} does not define unsupported_if_sharded() to return ''"

    def track_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a point to the series of ``every_n_train_steps``; by default, analyze all splits."""
        for analysis in _analyses_of(trainer):
            analysis.finish_batch()
        self._track(trainer, pl_module, self.tracked_steps, trainer.global_step)

    def finish_batch(self) -> None:
        """Finish the records of a training batch, before an analysis of any callback runs the model again."""

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0:
            self._track(trainer, pl_module, self.tracked, epoch)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "fit" in self._stages:
            self.results = {}
            self._analyze_all(trainer, pl_module, self.splits, self.weights)
        if self is _analyses_of(trainer)[-1]:
            log_hparams(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "validate" in self._stages and trainer.state.fn == "validate":
            self.results.pop("val", None)
            self._analyze_all(trainer, pl_module, ["val"], "last")

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "test" in self._stages:
            self.results.pop("test", None)
            self._analyze_all(trainer, pl_module, ["test"], "last")

    @property
    def runs_in_fit(self) -> bool:
        """True if the analysis runs at the end of fit or during it."""
        return self._runs_in_training or self.stages is None or "fit" in self.stages

    @property
    def _runs_in_training(self) -> bool:
        return self.every_n_epochs is not None or self.every_n_train_steps is not None

    @property
    def _stages(self) -> Sequence[Stage]:
        if self.stages is not None:
            return self.stages
        return ("fit",) if self._has_fitted else ("fit", "validate", "test")

    def _track(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        tracked: dict[Split, dict[int, Mapping[str, float]]],
        at: int,
    ) -> None:
        self.results = {}  # results of earlier weights do not belong to these
        self.is_tracking = True
        try:
            done = self._analyze_all(trainer, pl_module, self.splits, "last")
        finally:
            self.is_tracking = False
        for split, metrics in done.items():
            tracked.setdefault(split, {})[at] = metrics

    def _analyze_all(
        self, trainer: Trainer, pl_module: LightningModule, splits: Iterable[Split], weights: Weights
    ) -> dict[Split, Mapping[str, float]]:
        """Analyze splits one by one; an error or Ctrl-C ends the analysis of a split, not the run.

        Returns:
            Metrics of the analyzed splits.
        """
        if self._is_left_out:
            return {}
        context = TrainerContext(trainer, type(self).__name__)
        done: dict[Split, Mapping[str, float]] = {}
        self.was_interrupted = False
        for split in splits:
            name = f"{self.name}/{split}"
            try:
                analyzed = self.analyze_split(context, pl_module, split, weights)
                done.update([] if analyzed is None else [analyzed])
            except KeyboardInterrupt as error:
                self.was_interrupted = True
                rank_zero_warn(f"{name}: {described(error)}. The trained model is unchanged.")
            except Exception as error:
                if self.on_error == "raise":
                    raise
                rank_zero_warn(
                    f"{name}: {described(error)}\nThe trained model is unchanged, and the other analyses continue."
                    f" Pass {type(self).__name__}(on_error='raise') for the traceback."
                )
        return done


def _analyses_of(trainer: Trainer) -> list[FitEndAnalysis]:
    return [callback for callback in trainer.callbacks if isinstance(callback, FitEndAnalysis)]  # type: ignore[attr-defined]

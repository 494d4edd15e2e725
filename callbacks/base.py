"""The base of the callbacks: when an analysis runs, and what an error or Ctrl-C in it costs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import Unpack, override

from moe_heads.callbacks._shared.evaluation import loss_of
from moe_heads.callbacks._shared.execution_context import TrainerContext
from moe_heads.callbacks._shared.one_split import Analysis, described
from moe_heads.callbacks._shared.options import AnalysisOptions, Stage, Weights
from moe_heads.callbacks._shared.reporting import log_hparams
from moe_heads.callbacks._shared.trainer_access import Split, is_sharded

__all__ = ["FitEndAnalysis"]


class FitEndAnalysis(Analysis, Callback):
    """A callback that analyses the trained model when fit ends.

    It runs in ``on_fit_end``: checkpoints are written and averaged weights are in place by then, so an analysis that
    fails costs nothing. Where there was no fit, it runs at the end of ``trainer.validate`` and ``trainer.test``, on the
    split evaluated there. It also runs every n epochs while training if asked to, and by a plain call of `analyze`
    without any Trainer. Within one fit the same weights on the same samples are not analyzed twice.

    Each split is analyzed by itself. The results are kept in ``results``, the numbers go to
    ``trainer.callback_metrics`` and every logger under ``<name>/<split>/<quantity>``, and figures, tables and meshes to
    the loggers that can show them. The last analysis of a trainer writes one row of TensorBoard's HPARAMS table.

    A subclass has a ``name``, a `compute` and a `report`, and says by class attributes whether it needs a loss
    (``needs_loss``), which split takes the place of one without data (``fallbacks``), and what several processes do
    (``over_ranks``): "same", every rank computes the same on all samples; "share", each gets its part of the samples
    and gives ``inputs.ranks`` to a function that adds up; "rank_zero", rank zero computes and the others wait.

    Args:
        options: What all analyses share; see `AnalysisOptions`.

    Attributes:
        results: Result by split.
        tracked: Metrics by split and epoch, of ``every_n_epochs``.
        is_tracking: Whether what runs at the moment is one of these.
        was_interrupted: Whether Ctrl-C ended a split of what ran last. The run goes on; who wants it to end can raise.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, **options: Unpack[AnalysisOptions]) -> None:
        super().__init__(**options)
        self.tracked: dict[Split, dict[int, Mapping[str, float]]] = {}
        self.is_tracking, self.was_interrupted = False, False
        self._has_fitted = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        owner = type(self).__name__
        if is_sharded(trainer):
            raise MisconfigurationException(
                f"{owner} needs the whole model in one process, which {type(trainer.strategy).__name__} does not have."
                " Train with strategy='ddp', or analyze a checkpoint of this run in a second script."
            )
        if sum(other.name == self.name for other in _analyses_of(trainer)) > 1:
            raise MisconfigurationException(
                f"{owner}: two analyses of this Trainer write below {self.name!r}. Give one of them another name:"
                f" {owner}(..., name='{self.name}_2')."
            )
        if stage != "fit":
            return
        at_the_end = "fit" in self._stages
        is_dry = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if at_the_end and self.weights == "best" and trainer.checkpoint_callback is None and not is_dry:
            raise MisconfigurationException(
                f"{owner}(weights='best') needs a checkpoint, and the Trainer writes none. Give it a"
                " ModelCheckpoint(monitor=...), or analyze weights='last'."
            )
        if self.needs_loss and (at_the_end or self.every_n_epochs is not None):
            # a loss that cannot be had is told before training, not after it
            loss_of(pl_module, self.loss_fn)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # before any analysis of this fit: another one may ask for these results
        self.results, self.tracked, self._known = {}, {}, {}
        self._has_fitted = True

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # not by state_dict: Lightning would ask whoever resumes without this callback to add it, and refuse two without
        # a name in its own words
        if kept := self.kept_in_checkpoints():
            checkpoint[self._checkpoint_key] = kept

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # an evaluation with the weights of another epoch takes nothing from what this fit has gathered
        is_wanted = trainer.state.fn == TrainerFn.FITTING or not self.kept_in_checkpoints()
        if self._checkpoint_key in checkpoint and is_wanted:
            self.restore(checkpoint[self._checkpoint_key])

    def kept_in_checkpoints(self) -> dict[str, Any]:
        """What a fit that is resumed has to know of the one before; tensors and plain data."""
        return {}

    def restore(self, kept: dict[str, Any]) -> None:
        """Take what `kept_in_checkpoints` gave."""

    @property
    def _checkpoint_key(self) -> str:
        return f"moe_heads/{self.name}"

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # what is known of weights and samples holds within one run: between two, anything may change
        self._known = {}

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if self.every_n_epochs is None or (epoch + 1) % self.every_n_epochs:
            return
        self.results = {}  # those of an earlier epoch are not those of this one
        self.is_tracking = True
        try:
            done = self._analyze_all(trainer, pl_module, self.splits, "last")
        finally:
            self.is_tracking = False
        for split, metrics in done.items():
            self.tracked.setdefault(split, {})[epoch] = metrics

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
        """Whether it runs at the end of fit, or in the course of it."""
        return self.every_n_epochs is not None or self.stages is None or "fit" in self.stages

    @property
    def _stages(self) -> Sequence[Stage]:
        if self.stages is not None:
            return self.stages
        return ("fit",) if self._has_fitted else ("fit", "validate", "test")

    def _analyze_all(
        self, trainer: Trainer, pl_module: LightningModule, splits: Iterable[Split], weights: Weights
    ) -> dict[Split, Mapping[str, float]]:
        """Analyze splits one by one; an error or Ctrl-C ends the analysis of a split, not the run.

        Returns:
            The numbers of the splits that were analyzed.
        """
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
                rank_zero_warn(f"{name}: {described(error)}. The trained model is as it was.")
            except Exception as error:
                if self.on_error == "raise":
                    raise
                rank_zero_warn(
                    f"{name}: {described(error)}\nThe trained model is as it was, and the other analyses go"
                    f" on. Pass {type(self).__name__}(on_error='raise') for the traceback."
                )
        return done


def _analyses_of(trainer: Trainer) -> list[FitEndAnalysis]:
    return [callback for callback in trainer.callbacks if isinstance(callback, FitEndAnalysis)]  # type: ignore[attr-defined]

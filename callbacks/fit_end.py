"""The common base of the analyses: when they run, on which device, data and loss, and what an error does."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from moe_heads.callbacks.evaluation import loss_of
from moe_heads.callbacks.functional.batches import LossFn
from moe_heads.callbacks.functional.preserve import preserved, seed_generators
from moe_heads.callbacks.progress import Advance, progress_bar
from moe_heads.callbacks.reporting import Report, log_hparams, log_report
from moe_heads.callbacks.sample import Sample, draw_sample
from moe_heads.callbacks.trainer_access import Split, analysing, is_sharded, loader_of, to_analysis_device

__all__ = ["AnalysisInputs", "FitEndAnalysis", "OnError"]

OnError = Literal["warn", "raise"]

_DRY_RUN_SAMPLES = 16


@dataclass(frozen=True)
class AnalysisInputs:
    """What an analysis gets to work with.

    Attributes:
        trainer: The trainer.
        model: The module, on the training device.
        loss_fn: ``loss_fn(model, batch) -> scalar``; None where the analysis needs no loss.
        batches: Batches on the training device.
        split: Where they come from.
        advance: Reports progress.
    """

    trainer: Trainer
    model: LightningModule
    loss_fn: LossFn | None
    batches: Sequence[Any]
    split: Split
    advance: Advance


class FitEndAnalysis(Callback, ABC):
    """A callback that analyses the trained model when fit ends.

    It runs in ``on_fit_end``: checkpoints are written and averaged weights are in place by then, so an analysis that
    fails costs nothing. Each split is analysed by itself; every rank computes the same on the same samples, rank zero
    writes. The results are kept in ``results``, the numbers go to ``trainer.callback_metrics`` and every logger under
    ``<analysis>/<split>/<quantity>``, and figures, tables and meshes to TensorBoard. The last analysis of a trainer
    writes one row of the HPARAMS table with all numbers of the run.

    Args:
        splits: Splits to analyse, of "train", "val" and "test". A missing test loader falls back to the validation
            data, and says so; a split without data is skipped, and says so.
        num_samples: Samples drawn of each split; 1,000 as in arXiv 2601.15021.
        batch_size: Samples a batch; it decides memory and speed, not results.
        seed: Seed of the draw and of the analysis.
        loss_fn: ``loss_fn(pl_module, batch) -> scalar``; by default the module's ``analysis_loss(batch)``, else what
            its ``training_step`` returns.
        on_error: "warn": an analysis that fails is reported and the others go on; "raise": its error ends the run.

    Attributes:
        results: Result by split, after fit.

    Raises:
        ValueError: If an argument is out of range.
    """

    name: ClassVar[str]
    needs_loss: ClassVar[bool] = True
    fallbacks: ClassVar[Mapping[Split, Sequence[Split]]] = {"test": ("val",)}

    def __init__(
        self,
        splits: Sequence[Split] = ("train", "test"),
        num_samples: int = 1000,
        batch_size: int = 250,
        seed: int = 0,
        loss_fn: LossFn | None = None,
        on_error: OnError = "warn",
    ) -> None:
        super().__init__()
        if not isinstance(splits, (list, tuple)) or not splits or set(splits) - set(get_args(Split)):
            raise ValueError(f"splits: expected a list of 'train', 'val', 'test'; got {splits!r}")
        numbers = {"num_samples": (num_samples, 1), "batch_size": (batch_size, 1), "seed": (seed, 0)}
        for argument, (value, least) in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{argument}: expected an integer of at least {least}; got {value!r}")
        if on_error not in get_args(OnError):
            raise ValueError(f"on_error: expected 'warn' or 'raise'; got {on_error!r}")
        self.splits, self.num_samples, self.batch_size, self.seed = tuple(splits), num_samples, batch_size, seed
        self.loss_fn, self.on_error = loss_fn, on_error
        self.results: dict[Split, Any] = {}

    @abstractmethod
    def compute(self, inputs: AnalysisInputs) -> Any:
        """Run the analysis and return its result."""

    @abstractmethod
    def report(self, result: Any) -> Report:
        """What the result says, for the loggers."""

    def shares_data_with(self, other: "FitEndAnalysis") -> bool:
        """Whether both analyse the same samples by the same loss."""
        names = ("num_samples", "batch_size", "seed", "loss_fn")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if is_sharded(trainer):
            raise MisconfigurationException(
                f"{type(self).__name__} needs the whole model in one process, which {type(trainer.strategy).__name__}"
                " does not have. Train with strategy='ddp', or analyse a checkpoint of this run in a second script."
            )
        if stage == "fit" and self.needs_loss:
            # a loss that cannot be had is told before training, not after it
            loss_of(pl_module, self.loss_fn)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # before any analysis of this fit: another one may ask for these results
        self.results = {}

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with analysing(trainer, pl_module), preserved(pl_module):
            # samples that the data set augments are the same in every analysis of one seed
            seed_generators(self.seed)
            pl_module.eval()
            for split, loaders in self._available_splits(trainer).items():
                self._analyse(trainer, pl_module, split, loaders)
        if self is [callback for callback in trainer.callbacks if isinstance(callback, FitEndAnalysis)][-1]:  # type: ignore[attr-defined]
            log_hparams(trainer)

    def _available_splits(self, trainer: Trainer) -> dict[Split, Any]:
        """Loaders of the splits that there are data for; what is missing is said."""
        found: dict[Split, Any] = {}
        for split in self.splits:
            for candidate in (split, *self.fallbacks.get(split, ())):
                loaders = loader_of(trainer, candidate)
                if loaders is not None:
                    break
            else:
                rank_zero_warn(f"{type(self).__name__}: the trainer has no {split} data; the split is skipped.")
                continue
            if candidate != split:
                rank_zero_warn(f"{type(self).__name__}: the trainer has no {split} data; {candidate} takes its place.")
            found[candidate] = loaders
        return found

    def _analyse(self, trainer: Trainer, pl_module: LightningModule, split: Split, loaders: Any) -> None:
        """Analyse one split; an error or Ctrl-C ends this analysis, not the run."""
        prefix = f"{self.name}/{split}"
        try:
            self._compute_and_report(trainer, pl_module, split, loaders)
        except KeyboardInterrupt:
            rank_zero_warn(f"{prefix}: interrupted, and left out. The trained model is as it was.")
        except Exception as error:
            if self.on_error == "raise":
                raise
            rank_zero_warn(
                f"{prefix}: failed with {type(error).__name__}: {error}\nThe trained model is as it was, and the other"
                f" analyses go on. Pass {type(self).__name__}(on_error='raise') for the traceback."
            )

    def _compute_and_report(self, trainer: Trainer, pl_module: LightningModule, split: Split, loaders: Any) -> None:
        prefix = f"{self.name}/{split}"
        # a dry run goes through everything, on few samples
        num_samples = min(self.num_samples, _DRY_RUN_SAMPLES) if trainer.fast_dev_run else self.num_samples  # type: ignore[attr-defined]
        sample = draw_sample(trainer, split, loaders, num_samples, self.batch_size, self.seed)
        batches = [to_analysis_device(trainer, batch) for batch in sample.batches]
        loss_fn = loss_of(pl_module, self.loss_fn) if self.needs_loss else None
        with progress_bar(trainer, prefix) as advance:
            result = self.compute(AnalysisInputs(trainer, pl_module, loss_fn, batches, split, advance))
        self.results[split] = result
        log_report(trainer, prefix, _with_origin(self.report(result), sample))


def _with_origin(report: Report, sample: Sample) -> Report:
    """The report with a line below each text that says which samples it is about."""
    line = f"\n\nSamples: {sample.description} ({sample.split} split)."
    return Report(
        report.metrics, {name: text + line for name, text in report.texts.items()}, report.figures, report.meshes
    )

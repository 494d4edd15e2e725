"""The common base of the analyses: when they run, and what becomes of a result, an error or Ctrl-C."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from typing_extensions import override

from moe_heads.callbacks.evaluation import loss_of
from moe_heads.callbacks.functional.batches import LossFn
from moe_heads.callbacks.functional.monitor import Monitor
from moe_heads.callbacks.functional.ranks import Ranks
from moe_heads.callbacks.inputs import AnalysisInputs, prepare
from moe_heads.callbacks.options import OnError, OverRanks, Stage, Weights, check_options
from moe_heads.callbacks.reporting import Report, log_hparams
from moe_heads.callbacks.sample import Sample
from moe_heads.callbacks.sites import Site, TrainerlessSite, TrainerSite
from moe_heads.callbacks.trainer_access import Split, is_sharded

__all__ = ["FitEndAnalysis"]


class FitEndAnalysis(Callback, ABC):
    """A callback that analyses the trained model when fit ends.

    It runs in ``on_fit_end``: checkpoints are written and averaged weights are in place by then, so an analysis that
    fails costs nothing. It also runs at the end of ``trainer.validate`` and ``trainer.test``, on the split evaluated
    there, every n epochs while training if asked to, and by a plain call of `analyse` without any Trainer. The same
    weights on the same samples are not analysed twice: the result that is there stands.

    Each split is analysed by itself. The results are kept in ``results``, the numbers go to
    ``trainer.callback_metrics`` and every logger under ``<name>/<split>/<quantity>``, and figures, tables and meshes to
    the loggers that can show them. The last analysis of a trainer writes one row of TensorBoard's HPARAMS table.

    A subclass has a ``name``, a `compute` and a `report`, and says by class attributes whether it needs a loss
    (``needs_loss``), which split takes the place of one without data (``fallbacks``), and what several processes do
    (``over_ranks``): "same", every rank computes the same on all samples; "share", each gets its part of the samples
    and gives ``inputs.ranks`` to a function that adds up; "first", rank zero computes and the others wait.

    Args:
        splits: Splits to analyse, of "train", "val" and "test"; by default train and test. A missing test loader falls
            back to the validation data, and says so; a split without data is skipped, and says so.
        num_samples: Samples drawn of each split; by default 1,000 as in arXiv 2601.15021.
        batch_size: Samples a batch and process, by default 250; it decides memory and speed, not results.
        seed: Seed of the draw and of the analysis.
        loss_fn: ``loss_fn(pl_module, batch) -> scalar``; by default the module's ``analysis_loss(batch)``, else what
            its ``training_step`` returns.
        stages: Calls of the Trainer at whose end to run: "fit", "validate", "test".
        every_n_epochs: Run also at the end of every n-th training epoch, on the weights as they are then; see
            ``tracked``. None for never.
        weights: "last": the weights at the end of fit; "best": those of the best checkpoint, loaded for the analysis
            and put back afterwards.
        max_time: Seconds for one split after which the best result so far is taken, marked as partial; None for any
            time.
        on_error: "warn": an analysis that fails is reported and the others go on; "raise": its error ends the run.
        name: First part of the keys; by default the name of the analysis. Two analyses of one kind in one Trainer need
            two names.

    Attributes:
        results: Result by split.
        tracked: Metrics by split and epoch, of ``every_n_epochs``.

    Raises:
        ValueError: If an argument is out of range.
    """

    name: str
    needs_loss: ClassVar[bool] = True
    fallbacks: ClassVar[Mapping[Split, Sequence[Split]]] = {"test": ("val",)}
    over_ranks: ClassVar[OverRanks] = "same"
    default_splits: ClassVar[Sequence[Split]] = ("train", "test")
    default_num_samples: ClassVar[int] = 1000

    def __init__(
        self,
        splits: Sequence[Split] | None = None,
        num_samples: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        loss_fn: LossFn | None = None,
        stages: Sequence[Stage] = ("fit", "validate", "test"),
        every_n_epochs: int | None = None,
        weights: Weights = "last",
        max_time: float | None = None,
        on_error: OnError = "warn",
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.splits: Sequence[Split] = self.default_splits if splits is None else splits
        self.num_samples = self.default_num_samples if num_samples is None else num_samples
        self.batch_size = 250 if batch_size is None else batch_size
        self.seed, self.loss_fn, self.max_time, self.on_error = seed, loss_fn, max_time, on_error
        self.stages, self.every_n_epochs, self.weights = stages, every_n_epochs, weights
        self.name = type(self).name if name is None else name
        check_options(self, needs_loss=self.needs_loss)
        self.results: dict[Split, Any] = {}
        self.tracked: dict[Split, dict[int, Mapping[str, float]]] = {}
        self._keys: dict[Split, bytes] = {}

    @abstractmethod
    def compute(self, inputs: AnalysisInputs) -> Any:
        """Run the analysis and return its result."""

    @abstractmethod
    def report(self, result: Any) -> Report:
        """What the result says, for the loggers."""

    def analyse(
        self,
        model: nn.Module,
        *,
        train: Any | None = None,
        val: Any | None = None,
        test: Any | None = None,
        device: torch.device | str | None = None,
    ) -> dict[Split, Any]:
        """Analyse a model without a Trainer: a checkpoint that was loaded, or a module that is trained elsewhere.

        Errors and Ctrl-C are raised. The model is left bit for bit as it was, and where it was.

        Args:
            model: A LightningModule, or any module with a ``loss_fn`` for this callback.
            train: Loader of the training data, or anything that gives batches when iterated; likewise the others.
            val: Validation data.
            test: Test data.
            device: Where to analyse; by default where the model is.

        Returns:
            ``results``: result by split, of those that data were given for.

        Raises:
            ValueError: If no data are given.
            MisconfigurationException: If the loss cannot be had.

        Example:
            >>> import torch
            >>> from moe_heads.callbacks import SharpnessCallback
            >>> batches = [(torch.randn(32, 4), torch.randint(3, (32,)))]
            >>> sharpness = SharpnessCallback(loss_fn=lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1]))
            >>> sharpness.analyse(torch.nn.Linear(4, 3), train=batches)["train"].num_samples
            32
        """
        given: dict[Split, Any] = {"train": train, "val": val, "test": test}
        given = {split: loaders for split, loaders in given.items() if loaders is not None}
        if not given:
            raise ValueError("train, val, test: expected data for at least one split; got none")
        self.results, self._keys = {}, {}
        site = TrainerlessSite(given, device)
        for split in given:
            self._analyse(site, model, split, self.weights)
        return self.results

    def result_for(self, inputs: AnalysisInputs) -> Any | None:
        """The whole result that is there for the same split, weights and samples, or None."""
        return self.results[inputs.split] if self._keys.get(inputs.split) == inputs.key else None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        owner = type(self).__name__
        if is_sharded(trainer):
            raise MisconfigurationException(
                f"{owner} needs the whole model in one process, which {type(trainer.strategy).__name__} does not have."
                " Train with strategy='ddp', or analyse a checkpoint of this run in a second script."
            )
        if sum(other.name == self.name for other in _analyses_of(trainer)) > 1:
            raise MisconfigurationException(
                f"{owner}: two analyses of this Trainer write below {self.name!r}. Give one of them another name:"
                f" {owner}(..., name='{self.name}_2')."
            )
        if stage != "fit":
            return
        if self.weights == "best" and trainer.checkpoint_callback is None:
            raise MisconfigurationException(
                f"{owner}(weights='best') needs a checkpoint, and the Trainer writes none. Give it a"
                " ModelCheckpoint(monitor=...), or analyse weights='last'."
            )
        if self.needs_loss:
            # a loss that cannot be had is told before training, not after it
            loss_of(pl_module, self.loss_fn)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # before any analysis of this fit: another one may ask for these results
        self.results, self.tracked, self._keys = {}, {}, {}

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if self.every_n_epochs is None or (epoch + 1) % self.every_n_epochs:
            return
        self._analyse_all(trainer, pl_module, self.splits, "last")
        for split, result in self.results.items():
            self.tracked.setdefault(split, {})[epoch] = self.report(result).metrics

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "fit" in self.stages:
            self._analyse_all(trainer, pl_module, self.splits, self.weights)
        if self is _analyses_of(trainer)[-1]:
            log_hparams(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "validate" in self.stages and trainer.state.fn == "validate":
            self._analyse_all(trainer, pl_module, ["val"], "last")

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "test" in self.stages:
            self._analyse_all(trainer, pl_module, ["test"], "last")

    def _analyse_all(
        self, trainer: Trainer, pl_module: LightningModule, splits: Iterable[Split], weights: Weights
    ) -> None:
        """Analyse splits one by one; an error or Ctrl-C ends the analysis of a split, not the run."""
        site = TrainerSite(trainer, type(self).__name__)
        for split in splits:
            name = f"{self.name}/{split}"
            try:
                self._analyse(site, pl_module, split, weights)
            except KeyboardInterrupt as error:
                rank_zero_warn(f"{name}: interrupted.{_notes(error)} The trained model is as it was.")
            except Exception as error:
                if self.on_error == "raise":
                    raise
                rank_zero_warn(
                    f"{name}: failed with {_said(error)}{_notes(error)}\nThe trained model is as it was, and the other"
                    f" analyses go on. Pass {type(self).__name__}(on_error='raise') for the traceback."
                )

    def _analyse(self, site: Site, model: nn.Module, split: Split, weights: Weights) -> None:
        """Analyse one split and record the result, also a partial one, before its error goes on."""
        ranks = site.ranks(f"{self.name}/{split}")
        error: BaseException | None = None
        with site.progress(ranks.name) as show, ExitStack() as stack:
            monitor = Monitor(self._max_time(site), show)
            with ranks.together():
                stack.enter_context(site.occupied(model, weights))
            prepared = prepare(site, model, split, self, monitor, ranks)
            if prepared is None:
                return
            inputs, sample = prepared
            is_known = self.result_for(inputs) is not None
            try:
                result = self.result_for(inputs) if is_known else self._computed(inputs, ranks)
            except (Exception, KeyboardInterrupt) as raised:
                error = raised
                reason = "interrupted" if isinstance(raised, KeyboardInterrupt) else _said(raised)
                result = ranks.first(lambda: monitor.partial(reason))
        # from here on the model is as it was, and the loggers are those of the run
        if result is not None:
            self._record(site, inputs, sample, result, is_known)
        if error is not None:
            if result is not None:
                error.add_note("What was found before that is kept, marked as partial.")
            raise error

    def _computed(self, inputs: AnalysisInputs, ranks: Ranks) -> Any:
        match self.over_ranks:
            case "share":
                return self.compute(inputs)
            case "first":
                return ranks.first(lambda: self.compute(inputs))
            case "same":
                with ranks.together():
                    return self.compute(inputs)

    def _record(self, site: Site, inputs: AnalysisInputs, sample: Sample, result: Any, is_known: bool) -> None:
        prefix, partial = f"{self.name}/{inputs.split}", getattr(result, "partial", "")
        self.results[inputs.split] = result
        self._keys[inputs.split] = b"" if partial else inputs.key
        if partial:
            rank_zero_warn(f"{prefix}: the result is partial: {partial}.")
        site.log(prefix, _with_origin(self.report(result), sample), is_known=is_known)

    def _max_time(self, site: Site) -> float | None:
        # the other ranks wait for rank zero, and torch.distributed waits only so long
        limits = [self.max_time, site.time_limit() if self.over_ranks == "first" else None]
        return min((limit for limit in limits if limit is not None), default=None)


def _analyses_of(trainer: Trainer) -> list[FitEndAnalysis]:
    return [callback for callback in trainer.callbacks if isinstance(callback, FitEndAnalysis)]  # type: ignore[attr-defined]


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _notes(error: BaseException) -> str:
    return "".join(f" {note}" for note in getattr(error, "__notes__", []))


def _with_origin(report: Report, sample: Sample) -> Report:
    """The report with a line below each text that says which samples it is about."""
    line = f"\n\nSamples: {sample.description} ({sample.split} split)."
    return replace(report, texts={name: text + line for name, text in report.texts.items()})

"""How one split is analyzed: sample, computation, what is kept of an error, and the record of the result."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from moe_heads.analysis._shared.batch_list import check_is_list
from moe_heads.analysis._shared.batches import LossFn
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.progress import Progress, Show, TimeUp
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.callbacks._shared.center_losses import CenterLossError, center_losses_of, check_center_losses
from moe_heads.callbacks._shared.execution_context import ExecutionContext, PlainContext
from moe_heads.callbacks._shared.inputs import AnalysisInputs, prepare
from moe_heads.callbacks._shared.options import OnError, OverRanks, Stage, Weights, check_options
from moe_heads.callbacks._shared.reporting import Report
from moe_heads.callbacks._shared.sample import Sample
from moe_heads.callbacks._shared.trainer_access import Split

__all__ = ["Analysis", "described"]


class Analysis(ABC):
    """An analysis of a model on samples of its splits; `FitEndAnalysis` says when it runs, and what its options are.

    Attributes:
        results: Result by split.
    """

    name: str
    needs_loss: ClassVar[bool] = True
    fallbacks: ClassVar[Mapping[Split, Sequence[Split]]] = {"test": ("val",)}
    over_ranks: OverRanks = "same"
    default_splits: ClassVar[Sequence[Split]] = ("train", "test")
    default_num_samples: ClassVar[int] = 1000
    default_batch_size: ClassVar[int] = 250

    def __init__(
        self,
        splits: Sequence[Split] | None = None,
        num_samples: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        loss_fn: LossFn | None = None,
        stages: Sequence[Stage] | None = None,
        every_n_epochs: int | None = None,
        weights: Weights = "last",
        max_time: float | None = None,
        on_error: OnError = "warn",
        name: str | None = None,
        batch_size_fn: BatchSizeFn | None = None,
        batch_weight_fn: BatchWeightFn | None = None,
    ) -> None:
        self.splits: Sequence[Split] = self.default_splits if splits is None else splits
        self.num_samples = self.default_num_samples if num_samples is None else num_samples
        self.batch_size = self.default_batch_size if batch_size is None else batch_size
        self.is_batch_size_default = batch_size is None
        self.batch_size_fn, self.batch_weight_fn = batch_size_fn, batch_weight_fn
        self.seed, self.loss_fn, self.max_time, self.on_error = seed, loss_fn, max_time, on_error
        self.stages, self.every_n_epochs, self.weights = stages, every_n_epochs, weights
        self.name = type(self).name if name is None else name
        check_options(self, needs_loss=self.needs_loss)
        self.results: dict[Split, Any] = {}
        self._known: dict[Split, tuple[bytes, Any]] = {}
        self._cuts: dict[Split, tuple[int, ...]] = {}

    @abstractmethod
    def compute(self, inputs: AnalysisInputs) -> Any:
        """Run the analysis and return its result."""

    @abstractmethod
    def report(self, result: Any) -> Report:
        """What the result says, for the loggers."""

    def analyze(
        self,
        model: nn.Module,
        *,
        train: Any | None = None,
        val: Any | None = None,
        test: Any | None = None,
        device: torch.device | str | None = None,
    ) -> dict[Split, Any]:
        """Analyze a model without a Trainer: a checkpoint that was loaded, or a module that is trained elsewhere.

        Errors and Ctrl-C are raised. The model is left bit for bit as it was, and where it was.

        Args:
            model: A LightningModule, or any module with a ``loss_fn`` for this callback.
            train: Loader of the training data, or anything that gives batches when iterated; likewise the others.
            val: Validation data.
            test: Test data.
            device: Where to analyze; by default where the model is.

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
            >>> sharpness.analyze(torch.nn.Linear(4, 3), train=batches)["train"].num_samples
            32
        """
        given: dict[Split, Any] = {"train": train, "val": val, "test": test}
        given = {split: loaders for split, loaders in given.items() if loaders is not None}
        if not given:
            raise ValueError("train, val, test: expected data for at least one split, got none")
        for split, loaders in given.items():
            if not isinstance(loaders, Mapping):  # a collection of loaders
                check_is_list(loaders, split, "a loader or a list of batches")
        self.results, self._known = {}, {}
        context = PlainContext(given, device)
        for split in given:
            self.analyze_split(context, model, split, self.weights)
        return self.results

    def result_for(self, inputs: AnalysisInputs) -> Any | None:
        """The whole result that is there for the same split, weights and samples, or None."""
        key, result = self._known.get(inputs.split, (b"", None))
        return result if key == inputs.key else None

    def is_enough(self, result: Any) -> bool:
        """Whether a result that is known says all that is wanted now."""
        return True

    def analyze_split(
        self, context: ExecutionContext, model: nn.Module, split: Split, weights: Weights
    ) -> tuple[Split, Mapping[str, float]] | None:
        """Analyze one split and record the result, also a partial one, before its error goes on.

        Args:
            context: Where.
            model: The model.
            split: The split asked for.
            weights: Which weights.

        Returns:
            The split that was analyzed, this one or the one that takes its place, and the numbers that were logged;
            None without data.
        """
        ranks = context.ranks(f"{self.name}/{split}")
        with ranks.working():
            return self._analyze_split(context, model, split, weights, ranks)

    def _analyze_split(
        self, context: ExecutionContext, model: nn.Module, split: Split, weights: Weights, ranks: Ranks
    ) -> tuple[Split, Mapping[str, float]] | None:
        result, error = None, None
        try:
            with context.progress(ranks.name) as show, ExitStack() as stack:
                progress = self._progress(context, show, ranks)
                stack.callback(progress.forget)
                with ranks.synchronized():
                    stack.enter_context(context.prepared(model, weights))
                prepared = prepare(context, model, split, self, progress, ranks)
                if prepared is None:
                    return None
                inputs, sample = prepared
                known = self.result_for(inputs)
                is_known = all(ranks.gather(known is not None and self.is_enough(known)))
                result, error = self._found(inputs, ranks, progress, is_known)
        except KeyboardInterrupt as raised:
            if result is None:
                raise
            error = raised  # pressed while all was put back: what was found is whole
        if isinstance(error, TimeUp) and result is not None:
            error = None  # the time was over, and there is a result
        # from here on the model is as it was, and the loggers are those of the run
        metrics: Mapping[str, float] = {}
        if result is not None:
            with ranks.synchronized():
                metrics = self._record(context, inputs, sample, result, is_known, is_told=error is not None)
        if error is not None:
            if result is not None:
                how = "marked as partial" if getattr(result, "partial", "") else "and whole"
                error.add_note(f"(what was found before is kept, {how})")
            if inputs.split != split:
                error.add_note(f"({inputs.split} data took the place of {split} data)")
            raise error
        return inputs.split, metrics

    def _found(
        self, inputs: AnalysisInputs, ranks: Ranks, progress: Progress, is_known: bool
    ) -> tuple[Any | None, BaseException | None]:
        """The result, which may be partial or missing, and the error that ended the analysis."""
        if is_known:
            return self.result_for(inputs), None
        try:
            result = self._computed(inputs, ranks)
            self._compare_centers(inputs, result)
            return result, None
        except (Exception, KeyboardInterrupt) as raised:
            error = raised
        if isinstance(error, CenterLossError):
            progress.forget()  # which of the two is the function that was trained is not known
        return ranks.run_on_rank_zero(partial(_partial, progress, error)), error

    def _compare_centers(self, inputs: AnalysisInputs, result: Any) -> None:
        """Refuse a result whose loss at the center is another one in a part of it, or in another analysis.

        Raises:
            CenterLossError: Names both.
        """
        losses = center_losses_of(f"{self.name}/{inputs.split}", result)
        callbacks = [] if inputs.trainer is None else inputs.trainer.callbacks  # type: ignore[attr-defined]
        for other in callbacks:
            if isinstance(other, Analysis) and other._loss == self._loss:
                losses = {**other._centers(inputs), **losses}
        check_center_losses(inputs.model, losses)

    @property
    def _loss(self) -> tuple[Any, ...]:
        """What decides about the mean loss of a sample."""
        return self.loss_fn, self.seed, self.batch_weight_fn

    def _centers(self, inputs: AnalysisInputs) -> dict[str, float]:
        """Losses at the center that are known of the same weights and samples, cut into the same batches."""
        known = {split: result for split, (key, result) in self._known.items() if key == inputs.key}
        alike = {split: result for split, result in known.items() if self._cuts[split] == inputs.cut}
        return {
            name: loss
            for split, result in alike.items()
            for name, loss in center_losses_of(f"{self.name}/{split}", result).items()
        }

    def _computed(self, inputs: AnalysisInputs, ranks: Ranks) -> Any:
        if self.over_ranks == "same":
            with ranks.synchronized():
                return self.compute(inputs)
        if self.over_ranks == "share" and inputs.ranks.size == ranks.size:
            return self.compute(inputs)
        # also where the sample could not be shared
        return ranks.run_on_rank_zero(lambda: self.compute(inputs))

    def _record(
        self,
        context: ExecutionContext,
        inputs: AnalysisInputs,
        sample: Sample,
        result: Any,
        is_known: bool,
        is_told: bool,
    ) -> Mapping[str, float]:
        prefix, ended = f"{self.name}/{inputs.split}", getattr(result, "partial", "")
        self.results[inputs.split] = result
        if ended and not is_told:
            rank_zero_warn(f"{prefix}: the result is partial: {ended}.")
        report = self.report(result)
        context.log(prefix, _with_origin(report, sample), is_known=is_known)
        if not ended:
            self._known[inputs.split] = inputs.key, result
            self._cuts[inputs.split] = inputs.cut
        return report.metrics

    def _progress(self, context: ExecutionContext, show: Show, ranks: Ranks) -> Progress:
        options: dict[str, Any] = {
            "on_tick": ranks.interrupts.check,
            "on_warning": lambda message: rank_zero_warn(f"{ranks.name}: {message}"),
        }
        limit = context.time_limit() if self.over_ranks == "rank_zero" else None
        if limit is None or (self.max_time is not None and self.max_time <= limit):
            return Progress(self.max_time, show, **options)
        # the other ranks wait for rank zero, and torch.distributed waits only so long
        end = f"half of the time for which the other ranks wait ({limit:g} s) was over"
        return Progress(limit, show, end=end, **options)


def _partial(progress: Progress, error: BaseException) -> Any | None:
    """What there is when an error ends an analysis; the error is what matters, whatever becomes of this."""
    try:
        return progress.partial(progress.end if isinstance(error, TimeUp) else described(error))
    except (ValueError, RuntimeError) as failure:
        error.add_note(f"(what was found before could not be kept: {failure})")
        return None


def described(error: BaseException) -> str:
    """Kind and message of an error, and the notes that were added to it."""
    kind = "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed with {type(error).__name__}: {error}"
    return " ".join([kind, *getattr(error, "__notes__", [])])


def _with_origin(report: Report, sample: Sample) -> Report:
    """The report with a line below each text that says which samples it is about."""
    line = f"\n\nSamples: {sample.description} ({sample.split} split)."
    return replace(report, texts={name: text + line for name, text in report.texts.items()})

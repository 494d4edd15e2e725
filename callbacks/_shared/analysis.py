"""Analysis of one split: sample, computation, partial results of errors, and report."""

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
from moe_heads.callbacks._shared.execution_context import ExecutionContext
from moe_heads.callbacks._shared.inputs import AnalysisInputs, prepare
from moe_heads.callbacks._shared.options import OnError, OverRanks, Stage, Weights, check_options
from moe_heads.callbacks._shared.plain_context import PlainContext
from moe_heads.callbacks._shared.reporting import Report
from moe_heads.callbacks._shared.sample import Sample
from moe_heads.callbacks._shared.trainer_access import Split

__all__ = ["Analysis", "described"]


class Analysis(ABC):
    """An analysis of a model on samples of its splits; `FitEndAnalysis` documents when it runs and its options.

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
        every_n_train_steps: int | None = None,
        max_overhead: float | None = None,
    ) -> None:
        self.splits: Sequence[Split] = self.default_splits if splits is None else splits
        self.num_samples = self.default_num_samples if num_samples is None else num_samples
        self.batch_size = self.default_batch_size if batch_size is None else batch_size
        self.is_batch_size_default = batch_size is None
        self.batch_size_fn, self.batch_weight_fn = batch_size_fn, batch_weight_fn
        self.seed, self.loss_fn, self.max_time, self.on_error = seed, loss_fn, max_time, on_error
        self.stages, self.weights = stages, weights
        self.every_n_epochs, self.every_n_train_steps = every_n_epochs, every_n_train_steps
        self.max_overhead = max_overhead
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
        """Return the metrics, texts, figures, meshes and files of a result for the loggers."""

    def analyze(
        self,
        model: nn.Module,
        *,
        train: Any | None = None,
        val: Any | None = None,
        test: Any | None = None,
        device: torch.device | str | None = None,
    ) -> dict[Split, Any]:
        """Analyze a model without a Trainer, such as a loaded checkpoint or a module with its own training loop.

        Errors and Ctrl-C are raised. The model is restored bit for bit, on its device.

        Args:
            model: A LightningModule, or any module with a ``loss_fn`` for this callback.
            train: Loader of the training data, or another iterable of batches; likewise for ``val`` and ``test``.
            val: Validation data.
            test: Test data.
            device: Device of the analysis; by default that of the model.

        Returns:
            ``results``: the result for each split with data.

        Raises:
            ValueError: If no data are given.
            MisconfigurationException: If there is no loss.

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
            raise ValueError("train, val, test: expected data for at least one split, got none.")
        for split, loaders in given.items():
            if not isinstance(loaders, Mapping):  # a collection of loaders
                check_is_list(loaders, split, "a loader or a list of batches")
        self.results, self._known = {}, {}
        context = PlainContext(given, device)
        for split in given:
            self.analyze_split(context, model, split, self.weights)
        return self.results

    def result_for(self, inputs: AnalysisInputs) -> Any | None:
        """Return the cached complete result for the same split, weights and samples, or None."""
        key, result = self._known.get(inputs.split, (b"", None))
        return result if key == inputs.key else None

    def is_enough(self, result: Any) -> bool:
        """Return whether the cached result already contains every requested quantity."""
        return True

    def analyze_split(
        self, context: ExecutionContext, model: nn.Module, split: Split, weights: Weights
    ) -> tuple[Split, Mapping[str, float]] | None:
        """Analyze one split and record the result; a partial result is recorded before its error is raised.

        Args:
            context: Context of the analysis.
            model: The model.
            split: The requested split.
            weights: The weights to analyze.

        Returns:
            The analyzed split, which may be a fallback, and the logged metrics; None without data.
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
                    if self.needs_loss:
                        stack.enter_context(context.full_precision(model))
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
            error = raised  # Ctrl-C while the state was restored: the result is complete
        if isinstance(error, TimeUp) and result is not None:
            error = None  # the time limit was exceeded, and there is a result
        # from here on the model is restored and the loggers of the run are active
        metrics: Mapping[str, float] = {}
        if result is not None:
            with ranks.synchronized():
                metrics = self._record(context, inputs, sample, result, is_known, has_error=error is not None)
        if error is not None:
            if result is not None:
                kind = "partial" if getattr(result, "partial", "") else "complete"
                error.add_note(f"(the {kind} result up to this point is kept)")
            if inputs.split != split:
                error.add_note(f"({inputs.split} data were used instead of {split} data)")
            raise error
        return inputs.split, metrics

    def _found(
        self, inputs: AnalysisInputs, ranks: Ranks, progress: Progress, is_known: bool
    ) -> tuple[Any | None, BaseException | None]:
        """Return the result, which may be partial or missing, and the error that ended the analysis."""
        if is_known:
            return self.result_for(inputs), None
        try:
            result = self._computed(inputs, ranks)
            self._compare_centers(inputs, result)
            return result, None
        except (Exception, KeyboardInterrupt) as raised:
            error = raised
        if isinstance(error, CenterLossError):
            progress.forget()  # it is unknown which of the two losses belongs to training
        return ranks.run_on_rank_zero(partial(_partial, progress, error)), error

    def _compare_centers(self, inputs: AnalysisInputs, result: Any) -> None:
        """Check that all parts of the result and all other analyses have the same loss at the center.

        Raises:
            CenterLossError: If two losses differ.
        """
        losses = center_losses_of(f"{self.name}/{inputs.split}", result)
        for other in inputs.context.analyses:
            if other._loss == self._loss:
                losses = {**other._centers(inputs), **losses}
        check_center_losses(inputs.model, losses)

    @property
    def _loss(self) -> tuple[Any, ...]:
        """Options that determine the mean loss of a sample."""
        return self.loss_fn, self.seed, self.batch_weight_fn

    def _centers(self, inputs: AnalysisInputs) -> dict[str, float]:
        """Return the cached center losses for the same weights and samples in the same batches."""
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
        # also if the sample could not be divided among the ranks
        return ranks.run_on_rank_zero(lambda: self.compute(inputs))

    def _record(
        self,
        context: ExecutionContext,
        inputs: AnalysisInputs,
        sample: Sample,
        result: Any,
        is_known: bool,
        has_error: bool,
    ) -> Mapping[str, float]:
        prefix, ended = f"{self.name}/{inputs.split}", getattr(result, "partial", "")
        self.results[inputs.split] = result
        if ended and not has_error:
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
        # the other ranks wait for rank zero, up to the timeout of torch.distributed
        end = f"half of the timeout of the other ranks ({limit:g} s) was exceeded"
        return Progress(limit, show, end=end, **options)


def _partial(progress: Progress, error: BaseException) -> Any | None:
    """Return the partial result after an error; a failure to build it only adds a note to the error."""
    try:
        return progress.partial(progress.end if isinstance(error, TimeUp) else described(error))
    except (ValueError, RuntimeError) as failure:
        error.add_note(f"(the partial result could not be built: {failure})")
        return None


def described(error: BaseException) -> str:
    """Return the type, message and notes of an error as text."""
    kind = "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed with {type(error).__name__}: {error}"
    return " ".join([kind, *getattr(error, "__notes__", [])])


def _with_origin(report: Report, sample: Sample) -> Report:
    """Add a line with the description of the samples to each text of a report."""
    line = f"\n\nSamples: {sample.description} ({sample.split} split)."
    return replace(report, texts={name: text + line for name, text in report.texts.items()})

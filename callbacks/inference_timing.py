"""Callback: latency and throughput of inference at the end of fit."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import ClassVar

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import Unpack, override

from moe_heads.callbacks.evaluation import check_forward
from moe_heads.callbacks.fit_end import FitEndAnalysis
from moe_heads.callbacks.functional import InferenceTimingResult, inference_timing
from moe_heads.callbacks.functional.common.batches import ForwardFn, call_model
from moe_heads.callbacks.functional.inference_timing import check_timing_options
from moe_heads.callbacks.inputs import AnalysisInputs
from moe_heads.callbacks.options import AnalysisOptions, OverRanks
from moe_heads.callbacks.reporting import Report
from moe_heads.callbacks.trainer_access import Split, forward_context

__all__ = ["InferenceTimingCallback"]


class InferenceTimingCallback(FitEndAnalysis):
    """Percentiles of the latency of the model, its backbone and its head for several batch sizes, at the end of fit.

    The parts are timed by themselves as well, on the inputs that they get inside the model: the backbone usually hides
    the head. Logged at the end of fit, below ``inference_timing/<split>/``: p50, p90 and p99 in milliseconds and
    samples a second for each module and batch size; to TensorBoard also the figure ``latency`` and the text
    ``summary``.

    Args:
        batch_sizes: Batch sizes; 256 is that of arXiv 2601.15021, 1 shows the overhead, 32 is in between.
        num_runs: Timed runs of each module and batch size. The 99th percentile needs a hundred to mean much.
        warmup_runs: Runs before them that do not count.
        modules: Dotted names of the parts to time; by default the model's backbone, head and heads with a router.
        forward_fn: ``forward_fn(pl_module, batch)``; by default the module is called with a batch's first entry.
        options: What all analyses share, without a loss; see `AnalysisOptions`. Only the test split by default, as the
            time does not depend on the data; validation and then training data take its place. The number of samples
            follows from ``batch_sizes``.

    Example:
        >>> from moe_heads.callbacks import InferenceTimingCallback
        >>> InferenceTimingCallback(batch_sizes=(1, 256)).batch_sizes
        (1, 256)
    """

    name = "inference_timing"
    needs_loss: ClassVar[bool] = False
    over_ranks: OverRanks = "first"
    default_splits: ClassVar[Sequence[Split]] = ("test",)
    fallbacks: ClassVar[Mapping[Split, Sequence[Split]]] = {"test": ("val", "train")}
    results: dict[Split, InferenceTimingResult]

    def __init__(
        self,
        batch_sizes: Sequence[int] = (1, 32, 256),
        num_runs: int = 100,
        warmup_runs: int = 10,
        modules: Sequence[str] | None = None,
        forward_fn: ForwardFn | None = None,
        **options: Unpack[AnalysisOptions],
    ) -> None:
        check_timing_options(batch_sizes, num_runs, warmup_runs)
        if isinstance(modules, str):
            raise ValueError(f"modules: expected a list of dotted names; got {modules!r}")
        for argument in ("num_samples", "batch_size"):
            if options.get(argument) is not None:
                raise ValueError(f"{argument}: expected None, since batch_sizes decides; got {options.get(argument)!r}")
        # one batch holds the largest size
        options["num_samples"] = options["batch_size"] = max(batch_sizes)
        super().__init__(**options)
        self.batch_sizes, self.num_runs, self.warmup_runs = tuple(batch_sizes), num_runs, warmup_runs
        self.modules, self.forward_fn = modules, forward_fn

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_forward(self, pl_module, self.forward_fn)

    @override
    def compute(self, inputs: AnalysisInputs) -> InferenceTimingResult:
        with nullcontext() if inputs.trainer is None else forward_context(inputs.trainer):
            return inference_timing(
                inputs.model,
                inputs.batches[0],
                batch_sizes=self.batch_sizes,
                modules=self.modules,
                num_runs=self.num_runs,
                warmup_runs=self.warmup_runs,
                forward_fn=self.forward_fn or call_model,
                seed=self.seed,
                monitor=inputs.monitor,
            )

    @override
    def report(self, result: InferenceTimingResult) -> Report:
        return Report(result.metrics(), {"summary": result.summary()}, {"latency": result.plot()[0]})

"""Callback: latency and throughput of inference at the end of fit."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import ClassVar

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import Unpack, override

from moe_heads.analysis import InferenceTimingResult, inference_timing
from moe_heads.analysis._shared.batches import ForwardFn, call_model
from moe_heads.analysis.expert_utilization.labels import are_names
from moe_heads.analysis.inference_timing.plan import DEFAULT_SIZES, TimingPlan
from moe_heads.analysis.inference_timing.rounds import Cache
from moe_heads.analysis.inference_timing.row import TimingMode
from moe_heads.callbacks._shared.evaluation import check_forward
from moe_heads.callbacks._shared.inputs import AnalysisInputs
from moe_heads.callbacks._shared.options import AnalysisOptions, OverRanks
from moe_heads.callbacks._shared.reporting import Report
from moe_heads.callbacks._shared.trainer_access import Split, forward_context
from moe_heads.callbacks.base import FitEndAnalysis
from moe_heads.checks import check_callables

__all__ = ["InferenceTimingCallback"]

# samples are repeated to fill a batch; more of them than this change no time
_MOST_SAMPLES = 256


class InferenceTimingCallback(FitEndAnalysis):
    """Percentiles of the latency of the model and of its parts over batch sizes, and what a sparse head gains by them.

    The parts are timed by themselves as well, on the inputs that they get inside the model: the backbone usually hides
    the head. Beside a head with a router runs a dense head of equal capacity. Logged at the end of fit, below
    ``inference_timing/<split>/``:

    - ``<module>/batch<size>/p50_ms``, ``p90_ms``, ``p99_ms`` (milliseconds) and ``samples_per_s``; in another mode than
      eager ``<module>/batch<size>/<mode>/...``;
    - ``<head>/batch<size>/speedup`` and ``theoretical_speedup``, time and arithmetic of the dense head divided by those
      of the head, and ``<head>/break_even_batch``, where there is one;
    - to TensorBoard also the figures ``latency``, ``throughput``, ``gap`` and ``split`` and the text ``summary``, and
      beside the events the file ``timing.json`` with everything.

    Args:
        batch_sizes: Batch sizes; 256 is that of arXiv 2601.15021, 1 shows the overhead.
        num_runs: Most timed runs of each module and batch size.
        warmup_runs: Runs before them that do not count; by default until the times are stable.
        modules: Dotted names of the parts to time; by default the model's backbone, head, and heads with a router.
        forward_fn: ``forward_fn(pl_module, batch)``; by default the module is called with a batch's first entry.
        modes: How to run, see `TimingMode`; eager only by default, as compiling takes longer than all the rest.
        caches: "warm", "cold" or both.
        seconds_per_size: Time for a batch size with its warm-up, unless six rounds take longer.
        max_seconds: Time for the sweep: sizes for which it does not reach are left out and named. ``max_time`` in turn
            ends the analysis, and marks the result as partial.
        options: What all analyses share, without a loss; see `AnalysisOptions`. Only the test split by default, as the
            time does not depend on the data; validation and then training data take its place. The number of samples
            follows from ``batch_sizes``, up to 256, which are repeated.

    Example:
        >>> from moe_heads.callbacks import InferenceTimingCallback
        >>> InferenceTimingCallback(batch_sizes=(1, 256)).batch_sizes
        (1, 256)
    """

    name = "inference_timing"
    needs_loss: ClassVar[bool] = False
    over_ranks: OverRanks = "rank_zero"
    default_splits: ClassVar[Sequence[Split]] = ("test",)
    fallbacks: ClassVar[Mapping[Split, Sequence[Split]]] = {"test": ("val", "train")}
    results: dict[Split, InferenceTimingResult]

    def __init__(
        self,
        batch_sizes: Sequence[int] = DEFAULT_SIZES,
        num_runs: int = 1000,
        warmup_runs: int | None = None,
        modules: Sequence[str] | None = None,
        forward_fn: ForwardFn | None = None,
        modes: Sequence[TimingMode] = ("eager",),
        caches: Sequence[Cache] = ("warm",),
        seconds_per_size: float = 0.8,
        max_seconds: float = 50.0,
        **options: Unpack[AnalysisOptions],
    ) -> None:
        TimingPlan(
            batch_sizes,
            modes,
            caches,
            num_runs,
            warmup_runs,
            seconds_per_size=seconds_per_size,
            max_seconds=max_seconds,
        )
        check_callables(forward_fn=forward_fn)
        if modules is not None and not are_names(modules):
            raise ValueError(f"modules: expected a list of dotted names, got {modules!r}")
        for argument in ("num_samples", "batch_size"):
            if options.get(argument) is not None:
                raise ValueError(f"{argument}: expected None, since batch_sizes decides, got {options.get(argument)!r}")
        options["num_samples"] = options["batch_size"] = min(max(batch_sizes), _MOST_SAMPLES)
        super().__init__(**options)
        self.batch_sizes, self.num_runs, self.warmup_runs = tuple(batch_sizes), num_runs, warmup_runs
        self.modules, self.forward_fn = modules, forward_fn
        self.modes, self.caches = tuple(modes), tuple(caches)
        self.seconds_per_size, self.max_seconds = seconds_per_size, max_seconds

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
                modes=self.modes,
                caches=self.caches,
                num_runs=self.num_runs,
                warmup_runs=self.warmup_runs,
                seconds_per_size=self.seconds_per_size,
                max_seconds=self.max_seconds,
                forward_fn=self.forward_fn or call_model,
                seed=self.seed,
                progress=inputs.progress,
            )

    @override
    def report(self, result: InferenceTimingResult) -> Report:
        figures = {
            "latency": result.plot()[0],
            "throughput": result.plot_throughput(),
            "gap": result.plot_gap(),
            "split": result.plot_split(),
        }
        return Report(
            result.metrics(),
            {"summary": result.summary()},
            {name: figure for name, figure in figures.items() if figure is not None},
            files={"timing.json": result.to_json().encode()},
        )

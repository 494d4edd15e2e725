"""Callback for latency and throughput of inference at the end of fit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn
from typing_extensions import Unpack, override

from moe_heads.analysis import InferenceTimingResult, inference_timing
from moe_heads.analysis._shared.batches import Batch, ForwardFn, call_model
from moe_heads.analysis._shared.names import check_names
from moe_heads.analysis._shared.progress import TimeUp
from moe_heads.analysis._shared.state import preserved
from moe_heads.analysis.inference_timing.calls import TimingMode
from moe_heads.analysis.inference_timing.capture import named_modules
from moe_heads.analysis.inference_timing.plan import DEFAULT_SIZES, TimingPlan
from moe_heads.analysis.inference_timing.requests import chooses_experts
from moe_heads.analysis.inference_timing.served import check_served
from moe_heads.callbacks._shared.evaluation import check_forward
from moe_heads.callbacks._shared.execution_context import ExecutionContext
from moe_heads.callbacks._shared.inputs import AnalysisInputs
from moe_heads.callbacks._shared.options import AnalysisOptions, OverRanks
from moe_heads.callbacks._shared.reporting import Report
from moe_heads.callbacks._shared.request_batches import request_batches
from moe_heads.callbacks._shared.trainer_access import Split
from moe_heads.callbacks.base import FitEndAnalysis
from moe_heads.checks import check_callables

__all__ = ["InferenceTimingCallback"]

# samples of the fingerprint, and of the only batch where the data are batches
_MOST_SAMPLES = 256


class InferenceTimingCallback(FitEndAnalysis):
    """Latency percentiles and throughput of a model and its parts over batch sizes, and the speedup of sparse heads.

    The parts are also timed alone, on the inputs that they have inside the model, because the backbone usually hides
    the head. Each head with a router is compared with a dense head of equal capacity. The callback logs at the end of
    fit, below ``inference_timing/<split>/``:

    - ``<module>/batch<size>/p50_ms``, ``p90_ms``, ``p99_ms`` (milliseconds) and ``samples_per_s``; in modes other than
      eager ``<module>/batch<size>/<mode>/...``;
    - ``<head>/batch<size>/speedup`` and ``theoretical_speedup``, time and operations of the dense head divided by those
      of the head, and ``<head>/break_even_batch``, where there is one;
    - ``<head>/batch<size>/<part>_over_dense``, time of each part of a head and of the launches of its operators,
      divided by the time of the dense head;
    - ``<module>/batch<size>/between_draws_ms`` and ``within_draws_ms``, the spread over several batches and the noise
      of one, where several are timed;
    - to TensorBoard also the figures ``latency``, ``throughput``, ``gap`` and ``split`` and the text ``summary``, and
      next to the event file ``timing.json`` with the whole result.

    Args:
        batch_sizes: Batch sizes; 256 is that of arXiv 2601.15021, 1 shows the overhead.
        num_runs: Largest number of timed runs of each module and batch size.
        warmup_runs: Warm-up runs of each; by default until the times are stable.
        modules: Dotted names of the parts to time; by default the model's backbone, head, and heads with a router.
        forward_fn: ``forward_fn(pl_module, batch)``; by default the module is called with a batch's first entry, or
            with the entries of a mapping by name, without labels and other entries for the loss.
        modes: Execution modes, of "eager", "compiled", "cuda_graph", "bf16" and "channels_last". Eager only by
            default, because compilation takes longer than all the rest.
        seconds_per_size: Seconds per batch size with its warm-up, unless six rounds take longer.
        max_seconds: Seconds of the sweep; the result lists the sizes that do not fit. ``max_time`` also ends the
            analysis, and marks the result as partial.
        num_draws: Number of batches that are timed at each size. By default five if the time depends on the samples,
            because their shapes differ or because routers choose experts, and one otherwise.
        served_fn: ``served_fn(pl_module, batch)`` returns programs to time next to the model, by the name of their
            rows, such as ``{"exported": torch.export.export(...)}`` or an ONNX Runtime session. It is called once with
            the trained module in evaluation mode and a batch; see ``served`` of `moe_heads.analysis.inference_timing`.
        options: Options of all analyses except the loss; see `AnalysisOptions`. The default is the test split only; the
            validation and then the training data replace a missing one. The number of samples follows from
            ``batch_sizes``.

    Each batch is collated by the loader's function from samples of its own, drawn with the seed, so that its padding is
    that of a request. A batch sampler keeps its order, and an iterable data set gives its first samples. Up to 1,024
    samples are read, 256 if all have the same shape. Data that are batches already give rows of one batch.

    Example:
        >>> from moe_heads.callbacks import InferenceTimingCallback
        >>> InferenceTimingCallback(batch_sizes=(1, 256)).batch_sizes
        (1, 256)
    """

    name = "inference_timing"
    needs_loss: ClassVar[bool] = False
    has_smaller_points: ClassVar[bool] = False
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
        seconds_per_size: float = 0.8,
        max_seconds: float = 50.0,
        num_draws: int | None = None,
        served_fn: Callable[[nn.Module, Batch], Mapping[str, Any]] | None = None,
        **options: Unpack[AnalysisOptions],
    ) -> None:
        limits = {"seconds_per_size": seconds_per_size, "max_seconds": max_seconds, "num_draws": num_draws}
        TimingPlan(batch_sizes, modes, num_runs, warmup_runs, **limits)  # type: ignore[arg-type]
        check_callables(forward_fn=forward_fn, served_fn=served_fn)
        check_names(modules=modules)
        for argument in ("num_samples", "batch_size"):
            if options.get(argument) is not None:
                raise ValueError(f"{argument}: expected None, got {options.get(argument)!r}. Set batch_sizes instead.")
        options["num_samples"] = options["batch_size"] = min(max(batch_sizes), _MOST_SAMPLES)
        super().__init__(**options)
        self.batch_sizes, self.num_runs, self.warmup_runs = tuple(batch_sizes), num_runs, warmup_runs
        self.modules, self.forward_fn, self.served_fn = modules, forward_fn, served_fn
        self.modes, self.num_draws = tuple(modes), num_draws
        self.seconds_per_size, self.max_seconds = seconds_per_size, max_seconds

    @override
    def check_early(self, model: nn.Module) -> None:
        check_forward(type(self).__name__, model, self.forward_fn)

    @override
    def check_model(self, context: ExecutionContext, model: nn.Module) -> None:
        if self.modules is not None:
            named_modules(model, self.modules)  # a wrong name raises an error before training, not after it

    @override
    def unsupported_if_sharded(self) -> str:
        return "rank zero measures alone, and a pass of a sharded model needs all ranks"

    @override
    def compute(self, inputs: AnalysisInputs) -> InferenceTimingResult:
        may_repeat = not chooses_experts(inputs.model)
        drawn, reason = request_batches(inputs.context, inputs.split, self.seed, may_repeat=may_repeat)
        served = self._served(inputs)
        with inputs.context.forward_context():
            timing = inference_timing(
                inputs.model,
                drawn or inputs.batches[0],
                batch_sizes=self.batch_sizes,
                modules=self.modules,
                modes=self.modes,
                num_runs=self.num_runs,
                warmup_runs=self.warmup_runs,
                seconds_per_size=self.seconds_per_size,
                max_seconds=self.max_seconds,
                num_draws=self.num_draws,
                served=served,
                forward_fn=self.forward_fn or call_model,
                seed=self.seed,
                progress=inputs.progress,
            )
        if timing.requests is None or not reason:
            return timing
        # the rows of one batch have the padding of its longest sample
        requests = replace(timing.requests, origin=f"{timing.requests.origin}, because {reason}")
        return replace(timing, requests=requests)

    def _served(self, inputs: AnalysisInputs) -> Mapping[str, Any] | None:
        """Return the programs of ``served_fn``, None with a warning if it fails: the rest can be timed without them."""
        if self.served_fn is None:
            return None
        try:
            with preserved(inputs.model):
                served = self.served_fn(inputs.model.eval(), inputs.batches[0])
            check_served(served)
        except TimeUp:
            raise
        except Exception as error:  # any error of the user's function
            inputs.progress.warn(f"served_fn: failed with {type(error).__name__}: {error}. No program is timed.")
            return None
        return served

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

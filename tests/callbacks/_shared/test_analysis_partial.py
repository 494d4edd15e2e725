"""Partial results and errors of an analysis: results, warnings and logged metrics."""

import gc
import os
import signal
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads.analysis.sharpness.hessian import HessianOperator
from moe_heads.analysis.sharpness.hessian import graph_memory as graph_memory_module
from moe_heads.callbacks import (
    AnalysisInputs,
    ExpertUtilizationCallback,
    FitEndAnalysis,
    InferenceTimingCallback,
    LossLandscapeCallback,
    Report,
    SharpnessCallback,
)
from tests.support.hessians import cross_entropy
from tests.support.lightning_models import PlainModule, loader, trainer
from tests.support.no_second_derivative import RoughGradient


class Interrupting:
    """A loss that fails, or is interrupted, after a number of calls."""

    def __init__(self, calls: int, error: BaseException | None = None) -> None:
        self.calls, self.error = calls, error

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls -= 1
        if self.calls == 0:
            if self.error is None:
                os.kill(os.getpid(), signal.SIGINT)
            else:
                raise self.error
        return cross_entropy(model, batch)


def without_kept_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each product evaluates the loss, so that a loss can interrupt it."""
    monkeypatch.setattr(graph_memory_module, "CPU_GRAPH_MEMORY", 0)


def partial_after(
    monkeypatch: pytest.MonkeyPatch, calls: int, error: BaseException | None, message: str
) -> tuple[Any, Any, list[str]]:
    """One fit whose sharpness ends after some evaluations of the loss, and one whole analysis next to it."""
    without_kept_graphs(monkeypatch)
    broken = SharpnessCallback(splits=["train"], loss_fn=Interrupting(calls, error), num_eigenvalues=2, batch_size=50)
    fine = SharpnessCallback(splits=["train"], name="fine", batch_size=50)
    run = trainer(broken, fine)
    module = PlainModule()
    with pytest.warns(UserWarning, match=message) as caught:
        run.fit(module, loader())
    warned = [str(warning.message) for warning in caught if "sharpness/train" in str(warning.message)]
    assert fine.results["train"].converged
    assert "partial" not in fine.results["train"].metrics()
    return broken, run, warned


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, "interrupted"),
        (ZeroDivisionError("half way"), "failed with ZeroDivisionError: half way"),
    ],
)
def test_a_partial_result_is_kept_and_marked(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | None, reason: str
) -> None:
    broken, run, warned = partial_after(monkeypatch, 23, error, reason)
    result = broken.results["train"]
    assert result.partial == reason
    assert not result.converged
    assert 0 < result.num_products < 23
    assert f"**Partial**: {reason}, with {result.num_samples} samples." in result.summary()
    assert run.callback_metrics["sharpness/train/partial"] == 1
    assert run.callback_metrics["sharpness/train/lambda_max"] == pytest.approx(result.eigenvalues[0])
    assert "sharpness/train/trace" not in run.callback_metrics
    assert len(warned) == 1
    assert warned[0].startswith(f"sharpness/train: {reason} (the partial result up to this point is kept)")


def test_an_end_before_anything_was_found_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    broken, run, warned = partial_after(
        monkeypatch, 4, None, "sharpness/train: interrupted. The trained model is unchanged"
    )
    assert broken.results == {}
    assert not any(name.startswith("sharpness/") for name in run.callback_metrics)
    assert len(warned) == 1


class SlowLoss:
    """A loss that moves a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("moe_heads.analysis._shared.progress.time.monotonic", lambda: self.now)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.now += 1.0
        return cross_entropy(model, batch)


def test_max_time_ends_every_analysis_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kept_graphs(monkeypatch)
    loss = SlowLoss(monkeypatch)
    curvature = SharpnessCallback(splits=["train"], loss_fn=loss, max_time=30, num_eigenvalues=1)
    landscape = LossLandscapeCallback(splits=["train"], loss_fn=loss, max_time=200, line_points=3, plane_points=31)

    def forward(module: nn.Module, batch: Any) -> Tensor:
        loss.now += 1.0
        return module(batch[0])

    options: dict[str, Any] = {"splits": ["train"], "forward_fn": forward}
    usage = ExpertUtilizationCallback(max_time=1.5, batch_size=10, **options)
    timing = InferenceTimingCallback(
        max_time=8, batch_sizes=(1, 2, 4), num_runs=2, warmup_runs=1, num_draws=1, **options
    )
    run = trainer(curvature, landscape, usage, timing)
    with pytest.warns(UserWarning, match="the result is partial") as caught:
        run.fit(PlainModule(), loader())
    warned = sorted(str(w.message) for w in caught if "partial" in str(w.message))
    assert warned == [
        "expert_utilization/train: the result is partial: max_time = 1.5 s was over.",
        "inference_timing/train: the result is partial: max_time = 8 s was over.",
        "loss_landscape/train: the result is partial: max_time = 200 s was over.",
        "sharpness/train: the result is partial: max_time = 30 s was over.",
    ]
    assert 0 < curvature.results["train"].num_products < 30
    plane = landscape.results["train"].plane
    assert landscape.results["train"].line.partial == ""
    assert 0 < plane.num_unmeasured < 31**2
    assert plane.num_nonfinite == 0
    assert plane.losses[15, 15] == pytest.approx(plane.center_loss)
    assert plane.losses[0, 1].isnan()  # the edges come last, but for the two corners that prove what is reused
    assert 0 < usage.results["train"].num_samples < 40
    assert {row.batch_size for row in timing.results["train"].rows} == {1}
    for name in ("sharpness", "expert_utilization", "inference_timing"):
        assert run.callback_metrics[f"{name}/train/partial"] == 1
    assert run.callback_metrics["loss_landscape/train/partial"] == 1


def test_time_that_is_over_at_once_leaves_a_first_value(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = SlowLoss(monkeypatch)
    callback = SharpnessCallback(splits=["train"], loss_fn=loss, max_time=1.5)
    with pytest.warns(UserWarning, match=r"the result is partial: max_time = 1.5 s was over"):
        trainer(callback).fit(PlainModule(), loader())
    result = callback.results["train"]
    assert result.partial and not result.converged and len(result.eigenvalues) == 1


@pytest.mark.slow
def test_little_memory_changes_no_number() -> None:
    def narrow(model: nn.Module, batch: Any) -> Tensor:
        if len(batch[0]) > 5:
            raise torch.OutOfMemoryError("full")
        return cross_entropy(model, batch)

    found = []
    for loss_fn in (cross_entropy, narrow):
        torch.manual_seed(0)
        callback = SharpnessCallback(splits=["train"], loss_fn=loss_fn, num_eigenvalues=2, on_error="raise")
        trainer(callback, precision="64-true").fit(PlainModule(), loader())
        found.append(callback.results["train"].metrics())
    # the checks take whole batches, which do not fit here
    checks = {"rounding", "trace_rounding", "asymmetry", "derivative_error", "curvature_error", "cut_dependence"}
    few, whole = (
        {k: v for k, v in metrics.items() if k not in checks | {"residual_max"}} for metrics in reversed(found)
    )
    assert few == pytest.approx(whole, rel=1e-8)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda m, b: cross_entropy(m, b) * float("nan"), "expected a finite loss, got nan as the loss of batch 0"),
        (lambda m, b: (_ for _ in ()).throw(torch.OutOfMemoryError("full")), r"not enough memory for a single sample"),
        (lambda m, b: cross_entropy(m, b).detach(), "losses without a graph of them"),
        (lambda m, b: RoughGradient.apply(cross_entropy(m, b)), "products that differ by .* no second derivative"),
    ],
)
def test_an_unsupported_model_causes_one_warning_with_cause_and_remedy(loss_fn: Any, message: str) -> None:
    broken, fine = SharpnessCallback(splits=["train"], loss_fn=loss_fn), SharpnessCallback(splits=["train"], name="b")
    with pytest.warns(UserWarning, match=message) as caught:
        trainer(broken, fine).fit(PlainModule(), loader())
    assert sum("sharpness/train" in str(warning.message) for warning in caught) == 1
    assert broken.results == {}
    assert "train" in fine.results


def test_a_model_without_a_second_derivative_gets_its_plane_and_no_line() -> None:
    class Hard(PlainModule):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(RoughGradient.apply(self.body(x)))

    landscape = LossLandscapeCallback(splits=["train"], plane_points=3)
    run = trainer(landscape)
    with pytest.warns(UserWarning, match=r"once_differentiable.*\(the partial result up to this point is kept\)"):
        run.fit(Hard(), loader())
    result = landscape.results["train"]
    assert result.line is None
    assert result.plane.num_unmeasured == 0
    assert "once_differentiable" in result.partial
    assert run.callback_metrics["loss_landscape/train/partial"] == 1
    assert "**Partial**" in landscape.report(result).texts["summary"]


def test_a_loss_with_a_gradient_inside_is_analyzed() -> None:
    class Penalized(PlainModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0].clone().requires_grad_()
            (slope,) = torch.autograd.grad(self(x).square().sum(), x, create_graph=True)
            return slope.square().mean()

    options: dict[str, Any] = {"splits": ["train"], "on_error": "raise"}
    sharpness, landscape = SharpnessCallback(num_eigenvalues=1, **options), LossLandscapeCallback(**options)
    landscape.line_points = landscape.plane_points = 3
    trainer(sharpness, landscape).fit(Penalized(), loader())
    line = landscape.results["train"].line
    assert line.curvatures[0] == pytest.approx(sharpness.results["train"].eigenvalues[0], rel=0.5)


def test_ctrl_c_before_a_sample_is_counted_is_ctrl_c() -> None:
    def interrupted(module: nn.Module, batch: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ExpertUtilizationCallback(forward_fn=interrupted).analyze(PlainModule(), train=loader())


def test_a_result_that_cannot_be_made_partial_leaves_the_error_as_it_was() -> None:
    class Broken(FitEndAnalysis):
        name = "broken"

        def compute(self, inputs: AnalysisInputs) -> None:
            inputs.progress.keep(lambda reason: 1 / 0 if reason == "never" else (_ for _ in ()).throw(ValueError("no")))
            raise KeyError("mine")

        def report(self, result: Any) -> Report:
            return Report()

    with pytest.raises(KeyError, match="mine"):
        Broken().analyze(PlainModule(), train=loader())


def test_graphs_of_an_analysis_are_gone_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    operators: list[weakref.ref[HessianOperator]] = []
    initialize = HessianOperator.__init__

    def watched(self: HessianOperator, *args: Any, **options: Any) -> None:
        initialize(self, *args, **options)
        operators.append(weakref.ref(self))

    monkeypatch.setattr(HessianOperator, "__init__", watched)
    gc.collect()
    gc.disable()
    try:
        SharpnessCallback(num_eigenvalues=1).analyze(PlainModule(), train=loader())
        assert len(operators) == 1
        assert operators[0]() is None
    finally:
        gc.enable()


def test_ctrl_c_while_all_is_put_back_costs_no_result() -> None:
    class Moving(PlainModule):
        moves = -1

        def on_train_end(self) -> None:
            object.__setattr__(self, "moves", 0)

        def to(self, *args: Any, **kwargs: Any) -> Any:
            if self.moves >= 0:
                object.__setattr__(self, "moves", self.moves + 1)
            if self.moves == 2:  # to the device, and back
                os.kill(os.getpid(), signal.SIGINT)
            return super().to(*args, **kwargs)

    sharpness = SharpnessCallback(splits=["train"], num_eigenvalues=1)
    run = trainer(sharpness)
    with pytest.warns(UserWarning, match=r"interrupted \(the complete result up to this point is kept\)"):
        run.fit(Moving(), loader())
    assert sharpness.results["train"].converged
    assert run.callback_metrics["sharpness/train/lambda_max"] == pytest.approx(
        sharpness.results["train"].eigenvalues[0]
    )

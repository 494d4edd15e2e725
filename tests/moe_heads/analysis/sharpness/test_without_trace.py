"""Sharpness without the trace, and without the comparisons in float64: what is spent, and what the result says."""

import math
from typing import Any

import pytest
import torch

from moe_heads.analysis import sharpness
from moe_heads.analysis.sharpness import checks
from moe_heads.callbacks import SharpnessCallback
from moe_heads.commands.numbers import errors_of
from tests.support.hessians import classification, cross_entropy, dense_hessian, small_mlp


def test_no_probe_is_spent_and_nothing_speaks_of_the_trace() -> None:
    model, batch = small_mlp(), classification(20, 5)
    result = sharpness(model, cross_entropy, [batch], num_eigenvalues=2, trace=False, density=False)
    exact = torch.linalg.eigvalsh(dense_hessian(model, cross_entropy, batch)).flip(0)[:2]
    assert result.eigenvalues == pytest.approx(exact.tolist(), rel=1e-5)
    assert result.num_probes == 0
    # one product more than the steps, for the true residual
    assert result.num_products == result.num_steps + 1
    assert math.isnan(result.trace) and math.isnan(result.frobenius_norm) and not result.trace_converged
    assert all(math.isnan(block.trace) for block in result.blocks.values())
    assert result.converged and result.eigenvalues_converged
    assert not [name for name in result.metrics() if "trace" in name or "frobenius" in name]
    assert not [name for name in errors_of(result) if "trace" in name]
    summary = result.summary()
    assert "| trace | not computed |" in summary and "nan" not in summary and "probes" not in summary
    assert summary.count("trace") == 1
    figure = result.plot_blocks()
    assert figure is not None and [ax.get_title() for ax in figure.axes] == ["top eigenvectors"]


def test_the_density_needs_no_trace() -> None:
    options: dict[str, Any] = {"num_eigenvalues": 1, "density": True}
    model, batch = small_mlp(), classification(20, 5)
    without = sharpness(model, cross_entropy, [batch], trace=False, **options)
    whole = sharpness(model, cross_entropy, [batch], **options)
    assert without.density is not None and whole.density is not None
    assert torch.equal(without.density.nodes, whole.density.nodes)
    assert without.num_products < whole.num_products


@pytest.mark.filterwarnings("ignore:The eigenvalues did not converge")
def test_an_eigenvalue_that_did_not_converge_decides_alone() -> None:
    result = sharpness(small_mlp(), cross_entropy, [classification(20, 5)], max_steps=5, trace=False, density=False)
    assert not result.converged and result.metrics()["converged"] == 0
    assert "did not converge" in result.summary()


@pytest.mark.parametrize(("trace", "count"), [(True, 2), (False, 1)])
def test_the_check_in_float64_multiplies_no_probe(monkeypatch: pytest.MonkeyPatch, trace: bool, count: int) -> None:
    seen = []
    real = checks.check_in_double

    def counted(gradients: Any, data: Any, vectors: Any, *args: Any) -> Any:
        seen.append(len(vectors))
        return real(gradients, data, vectors, *args)

    monkeypatch.setattr(checks, "check_in_double", counted)
    options: dict[str, Any] = {"num_eigenvalues": 1, "density": False, "max_probes": 8}
    result = sharpness(small_mlp(), cross_entropy, [classification(20, 5)], trace=trace, **options)
    assert seen == [count]
    assert result.certificate is not None and result.certificate.rounding < 1e-9
    assert math.isfinite(result.certificate.trace_rounding) == trace


def test_a_check_that_is_left_out_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(checks, "check_in_double", forbidden)
    options: dict[str, Any] = {"num_eigenvalues": 1, "density": False, "trace": False}
    result = sharpness(
        small_mlp(), cross_entropy, [classification(20, 5)], skip_double_check="made at step 50", **options
    )
    assert result.summary().count("not checked: made at step 50") == 4
    assert result.certificate is not None and math.isnan(result.certificate.rounding)
    assert not {"rounding", "derivative_error", "curvature_error"} & set(result.metrics())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trace": None}, "trace: expected True or False, got None"),
        ({"skip_double_check": True}, "skip_double_check: expected the reason as text, or '', got True"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sharpness(small_mlp(), cross_entropy, [classification(20, 5)], **options)


def test_option_of_the_callback() -> None:
    callback = SharpnessCallback(loss_fn=cross_entropy, num_eigenvalues=1, density=False, trace=False)
    result = callback.analyze(small_mlp(), train=[classification(20, 5)])["train"]
    assert result.converged and result.num_probes == 0
    with pytest.raises(ValueError, match="trace: expected its default with engine='pyhessian', got False"):
        SharpnessCallback(engine="pyhessian", trace=False)

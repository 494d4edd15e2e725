from dataclasses import FrozenInstanceError, replace

import pytest

from moe_heads.analysis.sharpness.function import sharpness
from moe_heads.analysis.sharpness.result import SharpnessResult
from tests.support.hessians import classification, cross_entropy, small_mlp


@pytest.fixture
def result() -> SharpnessResult:
    return sharpness(small_mlp(), cross_entropy, [classification(20, 5)], num_eigenvalues=3)


@pytest.mark.parametrize(("residual", "is_logged"), [(0.1, True), (0.11, False), (float("nan"), False)])
def test_a_smallest_eigenvalue_of_unknown_sign_is_a_bound(
    result: SharpnessResult, residual: float, is_logged: bool
) -> None:
    found = replace(result, lambda_min=0.25, lambda_min_residual=residual)
    assert ("lambda_min" in found.metrics()) == is_logged
    assert ("| λmin | at most 0.25 |" in found.summary()) != is_logged


def test_metrics(result: SharpnessResult) -> None:
    metrics = result.metrics()
    assert list(metrics) == [
        "lambda_max",
        "lambda_2",
        "lambda_3",
        "lambda_min",
        "residual_max",
        "trace",
        "trace_stderr",
        "frobenius_norm",
        "center_loss",
        "asymmetry",
        "rounding",
        "trace_rounding",
        "derivative_error",
        "curvature_error",
        "cut_dependence",
        "trace_0",
        "trace_2",
        "trace_stderr_0",
        "trace_stderr_2",
        "share_0",
        "share_2",
        "num_products",
        "num_samples",
        "converged",
        "eigenvalues_converged",
        "trace_converged",
    ]
    assert all(type(value) is float for value in metrics.values())
    assert metrics["lambda_max"] == result.eigenvalues[0] and metrics["lambda_3"] == result.eigenvalues[2]
    assert metrics["residual_max"] == max(result.residuals) and metrics["converged"] == 1.0


def test_summary_is_a_table(result: SharpnessResult) -> None:
    lines = result.summary().splitlines()
    assert lines[0] == "| quantity | value | relative residual |"
    table, checks, blocks = result.summary().split("\n\n")
    assert checks.splitlines()[0] == "| checked on this input | error |"
    assert all(line.count("|") == 4 for line in table.splitlines())
    assert blocks.splitlines()[0] == "| block | parameters | trace | share of v1 | share of v2 | share of v3 |"
    assert blocks.splitlines()[2].startswith("| 0 | 36 | ") and len(blocks.splitlines()) == 4
    assert f"| λ1 | {result.eigenvalues[0]:.5g} |" in lines[2]
    assert f"| trace | {result.trace:.5g} ± {result.trace_stderr:.2g} |" in result.summary()
    assert f"| Hessian-vector products | {result.num_products} (" in result.summary()
    assert "| samples | 20 |" in result.summary() and "converge" not in result.summary()


def test_summary_names_what_rounding_hides(result: SharpnessResult) -> None:
    assert result.certificate is not None
    rounding = 0.9 * result.eigenvalues[1] * result.tolerance
    hidden = replace(
        result, eigenvalues_converged=False, certificate=replace(result.certificate, rounding=rounding, dtype="float32")
    )
    assert "λ3 did not converge: float32 does not resolve eigenvalues of this size" in hidden.summary()


def test_summary_and_warnings_name_what_is_no_hessian(result: SharpnessResult) -> None:
    assert result.certificate is not None and result.certificate.is_hessian and not result.certificate.warnings()
    skew, foreign = (replace(result.certificate, **error) for error in ({"asymmetry": 0.1}, {"derivative_error": 0.5}))
    assert not skew.is_hessian and not foreign.is_hessian
    assert "The products are not symmetric" in replace(result, certificate=skew).summary()
    assert "The gradient is not the derivative of the loss" in replace(result, certificate=foreign).summary()


def test_summary_says_what_did_not_converge(result: SharpnessResult) -> None:
    eigenvalues = replace(result, eigenvalues_converged=False)
    assert not eigenvalues.converged and eigenvalues.metrics()["converged"] == 0.0
    assert f"The eigenvalues did not converge in {result.num_steps} steps" in eigenvalues.summary()
    trace = replace(result, trace_converged=False)
    assert not trace.converged and "eigenvalues did not" not in trace.summary()
    assert f"The trace did not reach its tolerance with {result.num_probes} probes" in trace.summary()


def test_frozen(result: SharpnessResult) -> None:
    with pytest.raises(FrozenInstanceError):
        result.trace = 0.0  # type: ignore[misc]


def test_plot_draws_its_own_spectrum(result: SharpnessResult) -> None:
    figure, ax = result.plot()
    assert ax.figure is figure
    assert list(ax.lines[-1].get_xdata()) == list(result.eigenvalues)

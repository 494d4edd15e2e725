import pytest
import torch

from moe_heads.callbacks.functional.curvature.lanczos import LanczosResult, lanczos
from moe_heads.callbacks.functional.curvature.operator import HessianOperator
from moe_heads.callbacks.functional.curvature.trace import TraceResult, deflated_trace
from tests.support.hessians import DenseOperator, classification, cross_entropy, dense_hessian, small_mlp, symmetric


def spiked(dim: int = 150) -> DenseOperator:
    bulk = 0.5 * torch.randn(dim - 4, dtype=torch.float64)
    return DenseOperator(symmetric(torch.cat([torch.tensor([40.0, 25.0, 10.0, -4.0]).double(), bulk])))


def estimates(operator: DenseOperator, krylov: LanczosResult, num: int, num_probes: int) -> list[TraceResult]:
    generator = torch.Generator().manual_seed(1)
    return [
        deflated_trace(operator, krylov, generator=generator, tolerance=1e-9, max_probes=num_probes) for _ in range(num)
    ]


def test_unbiased_given_the_krylov_space_with_the_error_it_reports() -> None:
    operator = spiked()
    krylov = lanczos(operator, generator=torch.Generator().manual_seed(0), num_eigenvalues=2)
    results = estimates(operator, krylov, num=200, num_probes=10)
    values = torch.tensor([r.estimate for r in results]).double()
    spread = float(values.std())
    assert abs(float(values.mean() - operator.matrix.trace())) < 4 * spread / 200**0.5
    reported = torch.tensor([r.stderr for r in results]).square().mean() ** 0.5
    # The spread of 200 values is known to 5 %.
    assert spread == pytest.approx(float(reported), rel=0.2)


def test_deflation_removes_most_of_the_variance() -> None:
    operator = spiked()
    krylov = lanczos(operator, generator=torch.Generator().manual_seed(0), num_eigenvalues=3)
    offdiagonal = operator.matrix - torch.diag(operator.matrix.diag())
    plain = (2 * float(offdiagonal.square().sum()) / 20) ** 0.5
    deflated = estimates(operator, krylov, num=1, num_probes=20)[0].stderr
    assert deflated < plain / 4


def test_frobenius_norm() -> None:
    operator = spiked()
    krylov = lanczos(operator, generator=torch.Generator().manual_seed(0), num_eigenvalues=1, max_steps=3)
    squares = torch.tensor([r.frobenius_norm**2 for r in estimates(operator, krylov, num=100, num_probes=8)])
    standard_error = float(squares.std()) / 10
    assert abs(float(squares.mean()) - float(operator.matrix.square().sum())) < 4 * standard_error


def test_whole_space_needs_no_probe() -> None:
    model, batch = small_mlp(), classification(20, 5)
    exact = dense_hessian(model, cross_entropy, batch)
    operator = HessianOperator(model, cross_entropy, [batch])
    generator = torch.Generator().manual_seed(0)
    krylov = lanczos(operator, generator=generator, num_eigenvalues=57)
    result = deflated_trace(operator, krylov, generator=generator)
    assert result.num_probes == 0 and result.stderr == 0 and result.converged
    assert result.estimate == pytest.approx(float(exact.trace()), rel=1e-9)
    assert result.frobenius_norm == pytest.approx(float(exact.norm()), rel=1e-9)


def test_stops_at_the_tolerance() -> None:
    operator = spiked()
    generator = torch.Generator().manual_seed(0)
    krylov = lanczos(operator, generator=generator, num_eigenvalues=2)
    loose = deflated_trace(operator, krylov, generator=generator, tolerance=0.5)
    tight = deflated_trace(operator, krylov, generator=generator, tolerance=0.01, max_probes=10_000)
    assert loose.num_probes == 8 < tight.num_probes and tight.converged
    assert tight.stderr <= 0.01 * max(abs(tight.estimate), tight.frobenius_norm)
    assert abs(tight.estimate - float(operator.matrix.trace())) < 5 * tight.stderr
    given_up = deflated_trace(operator, krylov, generator=generator, tolerance=0.001, max_probes=9)
    assert not given_up.converged and given_up.num_probes == 9


def test_traceless_operator_converges_relative_to_the_frobenius_norm() -> None:
    values = torch.linspace(-1, 1, 200)
    operator = DenseOperator(symmetric(values))
    generator = torch.Generator().manual_seed(0)
    krylov = lanczos(operator, generator=generator, num_eigenvalues=1, max_steps=5)
    result = deflated_trace(operator, krylov, generator=generator, tolerance=0.2)
    assert result.converged and result.stderr <= 0.2 * result.frobenius_norm
    assert abs(result.estimate) < 5 * result.stderr


def test_bad_arguments() -> None:
    operator = spiked(20)
    generator = torch.Generator().manual_seed(0)
    krylov = lanczos(operator, generator=generator, num_eigenvalues=1)
    with pytest.raises(ValueError, match="tolerance: expected a positive number; got -1"):
        deflated_trace(operator, krylov, generator=generator, tolerance=-1)
    with pytest.raises(ValueError, match="max_probes: expected at least 8; got 7"):
        deflated_trace(operator, krylov, generator=generator, max_probes=7)

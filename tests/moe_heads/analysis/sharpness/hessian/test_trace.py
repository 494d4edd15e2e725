import pytest
import torch

from moe_heads.analysis.sharpness.hessian.lanczos import LanczosResult, lanczos
from moe_heads.analysis.sharpness.hessian.operator import HessianOperator
from moe_heads.analysis.sharpness.hessian.trace import TraceResult, deflated_trace
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
    results = estimates(operator, krylov, num=200, num_probes=18)
    values = torch.tensor([r.estimate for r in results]).double()
    spread = float(values.std())
    assert abs(float(values.mean() - operator.matrix.trace())) < 4 * spread / 200**0.5
    # seventeen degrees of freedom widen it
    reported = torch.tensor([r.stderr / 1.076 for r in results]).square().mean() ** 0.5
    # The spread of 200 values is known to 5 %.
    assert spread == pytest.approx(float(reported), rel=0.2)


def test_deflation_removes_most_of_the_variance() -> None:
    operator = spiked()
    krylov = lanczos(operator, generator=torch.Generator().manual_seed(0), num_eigenvalues=3)
    offdiagonal = operator.matrix - torch.diag(operator.matrix.diag())
    plain = (2 * float(offdiagonal.square().sum()) / 20) ** 0.5  # with random signs, the least that there is
    deflated = estimates(operator, krylov, num=1, num_probes=20)[0].stderr
    assert deflated < plain / 4


def test_frobenius_norm() -> None:
    operator = spiked()
    krylov = lanczos(operator, generator=torch.Generator().manual_seed(0), num_eigenvalues=1, max_steps=3)
    squares = torch.tensor([r.frobenius_norm**2 for r in estimates(operator, krylov, num=100, num_probes=16)])
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
    assert loose.num_probes == 16 < tight.num_probes and tight.converged
    assert tight.stderr <= 0.01 * max(abs(tight.estimate), tight.frobenius_norm)
    assert abs(tight.estimate - float(operator.matrix.trace())) < 5 * tight.stderr
    given_up = deflated_trace(operator, krylov, generator=generator, tolerance=0.001, max_probes=17)
    assert not given_up.converged and given_up.num_probes == 17


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
    with pytest.raises(ValueError, match="tolerance: expected a finite number above 0, got -1"):
        deflated_trace(operator, krylov, generator=generator, tolerance=-1)
    with pytest.raises(ValueError, match="max_probes: expected an integer of at least 8, got 7"):
        deflated_trace(operator, krylov, generator=generator, max_probes=7)


def in_parts(num_parts: int, dim: int = 80) -> DenseOperator:
    """A matrix that is a sum of parts which have most of their bulk in common."""
    common = symmetric(torch.cat([torch.tensor([20.0, 12.0]).double(), 0.5 * torch.randn(dim - 2).double()]))
    return DenseOperator(*[(common + symmetric(0.2 * torch.randn(dim))) / num_parts for _ in range(num_parts)])


def test_strata_are_unbiased_with_the_error_they_report_and_save_probes() -> None:
    operator = in_parts(8)
    whole = DenseOperator(operator.matrix)
    krylov = lanczos(operator, generator=torch.Generator().manual_seed(0), num_eigenvalues=2)
    results = estimates(operator, krylov, num=200, num_probes=16)
    values = torch.tensor([r.estimate for r in results]).double()
    spread, exact = float(values.std()), float(operator.matrix.trace())
    assert abs(float(values.mean()) - exact) < 4 * spread / 200**0.5
    reported = torch.tensor([r.stderr for r in results]).square().mean() ** 0.5
    assert spread == pytest.approx(float(reported), rel=0.2)
    unstratified = estimates(whole, krylov, num=200, num_probes=16)
    assert spread < 0.6 * float(torch.tensor([r.estimate for r in unstratified]).double().std())
    squares = torch.tensor([r.frobenius_norm**2 for r in results]).double()
    assert abs(float(squares.mean() - operator.matrix.square().sum())) < 4 * float(squares.std()) / 200**0.5


@pytest.mark.parametrize("num_parts", [1, pytest.param(4, marks=pytest.mark.slow), 16])
def test_two_standard_errors_cover_the_trace(num_parts: int) -> None:
    """Also of the estimate that stops by its own standard error; over 200 seeds, in 90 % at least."""
    operator, covered = in_parts(num_parts), 0
    places = {"some": [slice(0, 30)], "rest": [slice(30, 80)]}
    exact = {name: float(operator.matrix[s, s].trace()) for name, (s,) in places.items()}
    blocks_covered = dict.fromkeys(places, 0)
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        krylov = lanczos(operator, generator=generator, num_eigenvalues=2)
        result = deflated_trace(operator, krylov, generator=generator, tolerance=0.04, blocks=places)
        assert result.converged and result.stderr <= 0.04 * max(abs(result.estimate), result.frobenius_norm)
        covered += abs(result.estimate - float(operator.matrix.trace())) <= 2 * result.stderr
        for name, block in result.blocks.items():
            blocks_covered[name] += abs(block.estimate - exact[name]) <= 2 * block.stderr
    assert covered >= 180, covered
    assert min(blocks_covered.values()) >= 175, blocks_covered


@pytest.mark.parametrize(
    ("shares", "tolerance"),
    [
        pytest.param([0.9] + [0.1 / 15] * 15, 1.0, marks=pytest.mark.slow),
        ([0.97, 0.03], 0.3),
        pytest.param([1.0], 0.3, marks=pytest.mark.slow),
    ],
)
def test_two_standard_errors_cover_the_trace_where_one_stratum_outweighs_the_others(
    shares: list[float], tolerance: float
) -> None:
    torch.manual_seed(0)
    parts = [share * symmetric(torch.randn(60)) for share in shares]
    operator, covered = DenseOperator(*parts), 0
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        krylov = lanczos(operator, generator=generator, num_eigenvalues=1, max_steps=2)
        result = deflated_trace(operator, krylov, generator=generator, tolerance=tolerance)
        covered += abs(result.estimate - float(operator.matrix.trace())) <= 2 * result.stderr
    assert covered >= 270, covered


def test_blocks_sum_up_and_are_exact_on_the_whole_space() -> None:
    operator = in_parts(4, dim=30)
    places = {"one": [slice(0, 10), slice(20, 25)], "two": [slice(10, 20), slice(25, 30)], "none": []}
    generator = torch.Generator().manual_seed(0)
    few = lanczos(operator, generator=generator, num_eigenvalues=2)
    sampled = deflated_trace(operator, few, generator=generator, blocks=places)
    assert sum(block.estimate for block in sampled.blocks.values()) == pytest.approx(sampled.estimate, rel=1e-9)
    all_steps = lanczos(operator, generator=generator, num_eigenvalues=30)
    exact = deflated_trace(operator, all_steps, generator=generator, blocks=places)
    diagonal = operator.matrix.diag()
    assert exact.blocks["one"].estimate == pytest.approx(float(diagonal[:10].sum() + diagonal[20:25].sum()), rel=1e-9)
    assert exact.blocks["one"].stderr == 0 and exact.blocks["none"].estimate == 0


def test_blocks_after_a_restart() -> None:
    top, bulk = torch.tensor([9.0, 8.6, 8.3]), 2 * torch.randn(97)
    operator = DenseOperator(symmetric(torch.cat([top, bulk])))
    generator = torch.Generator().manual_seed(0)
    krylov = lanczos(operator, generator=generator, num_eigenvalues=3, basis_memory=14 * 100 * 8, tolerance=1e-9)
    assert krylov.num_steps > 14
    places = {"some": [slice(0, 40)], "rest": [slice(40, 100)]}
    results = [deflated_trace(operator, krylov, generator=generator, blocks=places) for _ in range(50)]
    for name, (place,) in places.items():
        values = torch.tensor([r.blocks[name].estimate for r in results]).double()
        exact = float(operator.matrix[place, place].trace())
        assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / 50**0.5

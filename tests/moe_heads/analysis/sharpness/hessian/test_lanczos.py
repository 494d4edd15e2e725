import itertools
import os
import signal
import sys

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh

from moe_heads.analysis.sharpness.hessian import completeness as completeness_module
from moe_heads.analysis.sharpness.hessian.basis import Basis
from moe_heads.analysis.sharpness.hessian.completeness import bound_outside, raised_by_chain
from moe_heads.analysis.sharpness.hessian.iteration import KrylovIteration
from moe_heads.analysis.sharpness.hessian.lanczos import LanczosResult, check_basis_memory, lanczos
from moe_heads.analysis.sharpness.hessian.operator import HessianOperator
from tests.support.hessians import DenseOperator, classification, cross_entropy, dense_hessian, small_mlp, symmetric


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decaying(dim: int = 200, dtype: torch.dtype = torch.float64) -> DenseOperator:
    """Few large eigenvalues over a bulk around zero, as in a trained network."""
    bulk = 0.1 * torch.randn(dim - 6, dtype=torch.float64)
    return DenseOperator(symmetric(torch.cat([torch.tensor([30.0, 20.0, 12.0, 9.0, 5.0, -3.0]).double(), bulk]), dtype))


def test_all_eigenvalues_of_a_small_network() -> None:
    model, batch = small_mlp(), classification(20, 5)
    expected = torch.linalg.eigvalsh(dense_hessian(model, cross_entropy, batch))
    operator = HessianOperator(model, cross_entropy, [batch])
    result = lanczos(operator, generator=seeded(), num_eigenvalues=57)
    assert result.converged and result.num_steps == operator.num_products == 57
    torch.testing.assert_close(torch.tensor(result.eigenvalues).flip(0).double(), expected, rtol=1e-6, atol=1e-6)
    assert result.lambda_min == pytest.approx(float(expected[0]), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_scipy_in_few_steps(dtype: torch.dtype) -> None:
    operator = decaying(dtype=dtype)
    result = lanczos(operator, generator=seeded(), num_eigenvalues=5)
    expected = np.sort(eigsh(operator.matrix.double().numpy(), k=5, which="LA")[0])[::-1]
    # The error of an eigenvalue is at most the squared residual over the gap.
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=2e-6)
    assert result.converged and result.num_steps < 25
    assert max(result.residuals) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_steps", [8, 60])
def test_reported_residuals_are_the_true_ones(dtype: torch.dtype, max_steps: int) -> None:
    operator = decaying(dtype=dtype)
    result = lanczos(operator, generator=seeded(), tolerance=1e-5, max_steps=max_steps)
    vectors = result.vectors()
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(5, dtype=dtype), rtol=0, atol=1e-5)
    for vector, value, reported in zip(vectors, result.eigenvalues, result.residuals, strict=True):
        true = float((operator.matvec(vector) - value * vector).norm()) / value
        floor = {torch.float32: 1e-5, torch.float64: 1e-10}[dtype] * 30 / value
        assert reported == pytest.approx(true, rel=0.02, abs=2 * floor)
    # float32 does not resolve 1e-5 of an eigenvalue that is a sixth of the largest
    assert result.converged == (max_steps == 60 and dtype == torch.float64)


def test_krylov_relation() -> None:
    operator = decaying()
    result = lanczos(operator, generator=seeded(), max_steps=10, tolerance=1e-12)
    q = result.basis.combined(torch.eye(10, dtype=torch.float64))
    t = result.projected
    assert torch.equal(t, t.T) and float(t.triu(2).abs().max()) == 0
    left = q @ operator.matrix - t @ q
    torch.testing.assert_close(q @ q.T, torch.eye(10, dtype=torch.float64), atol=1e-13, rtol=0)
    assert left[:-1].abs().max() < 1e-12
    assert float(left[-1].norm()) == pytest.approx(float(result.remainders[0].norm()), rel=1e-9)


def test_not_converged_is_said_and_values_are_lower_bounds() -> None:
    operator = DenseOperator(symmetric(torch.linspace(-1, 1, 300)))
    result = lanczos(operator, generator=seeded(), max_steps=20)
    assert not result.converged and result.num_steps == operator.num_products == 20
    assert max(result.residuals) > 1e-3
    exact = torch.linspace(-1, 1, 300).flip(0)
    assert all(value <= bound + 1e-12 for value, bound in zip(result.eigenvalues, exact.tolist()[:5], strict=True))
    assert result.lambda_min >= -1 and result.lambda_min_residual > 0


def test_negative_definite_operator() -> None:
    values = -torch.logspace(0, 3, 100)
    result = lanczos(DenseOperator(symmetric(values)), generator=seeded(), num_eigenvalues=2)
    torch.testing.assert_close(result.eigenvalues[0], -1.0, rtol=1e-4, atol=0)
    assert result.eigenvalues[0] >= result.eigenvalues[1]
    assert result.lambda_min == pytest.approx(-1000, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("num_eigenvalues", "expected"),
    [(1, [5.0]), (2, [5.0, 5.0]), (3, [5.0, 5.0, 5.0]), (5, [5.0, 5.0, 5.0, 1.0, 0.0])],
)
def test_multiple_eigenvalues_with_an_invariant_krylov_space(
    dtype: torch.dtype, num_eigenvalues: int, expected: list[float]
) -> None:
    operator = DenseOperator(symmetric([5.0] * 3 + [1.0] + [0.0] * 46, dtype))
    result = lanczos(operator, generator=seeded(), num_eigenvalues=num_eigenvalues)
    # an eigenvalue of zero cannot be warned from one of 1e-5 in float32
    assert result.converged == (dtype == torch.float64 or 0.0 not in expected)
    np.testing.assert_allclose(result.eigenvalues, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("copies", [2, 3, 10])
def test_all_copies_of_repeated_eigenvalues_of_a_rich_spectrum(dtype: torch.dtype, copies: int) -> None:
    """A Krylov space holds one copy of each; the others come from fresh vectors."""
    top = torch.tensor([10.0, 7.0, 4.0]).repeat_interleave(copies)
    operator = DenseOperator(symmetric(torch.cat([top, torch.linspace(-1, 1, 300 - len(top))]), dtype))
    for k, seed in itertools.product((2, 5), range(3)):
        result = lanczos(operator, generator=seeded(seed), num_eigenvalues=k)
        assert result.converged and result.num_steps < (60 if copies < 10 else 190)
        np.testing.assert_allclose(result.eigenvalues, top[:k], rtol=1e-4)


def test_a_copy_that_was_not_looked_for_is_no_certificate() -> None:
    operator = DenseOperator(symmetric(torch.cat([torch.tensor([10.0, 10.0, 4.0]), torch.linspace(-1, 1, 297)])))
    whole = lanczos(operator, generator=seeded(), num_eigenvalues=3)
    cut = lanczos(operator, generator=seeded(), num_eigenvalues=3, max_steps=whole.num_steps - whole.num_check_steps)
    assert whole.converged and whole.num_check_steps < 25
    assert cut.is_accurate and not cut.is_complete and not cut.converged


def test_warm_start_orthogonal_to_the_largest_eigenvector() -> None:
    matrix = symmetric(torch.cat([torch.tensor([10.0, 4.0, 3.0]), torch.linspace(-1, 1, 197)]))
    values, vectors = torch.linalg.eigh(matrix)
    result = lanczos(
        DenseOperator(matrix), generator=seeded(), num_eigenvalues=1, start=vectors[:, -2] + vectors[:, -3]
    )
    assert result.converged and result.eigenvalues[0] == pytest.approx(float(values[-1]), rel=1e-6)


def test_asymmetry_is_measured() -> None:
    matrix = decaying().matrix
    skew = torch.randn(200, 200, dtype=torch.float64)
    skew = 0.3 * (skew - skew.T) / float(torch.linalg.matrix_norm(skew - skew.T, 2))
    found = lanczos(DenseOperator(matrix + skew), generator=seeded(), max_steps=40, num_eigenvalues=5)
    assert 0.03 < found.asymmetry < 3 and not found.converged
    assert lanczos(DenseOperator(matrix), generator=seeded(), max_steps=40).asymmetry < 1e-12


def test_the_bound_on_what_is_outside_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 300 starts, a Lanczos run of few steps misses the largest eigenvalue less often than the bound says."""
    monkeypatch.setattr(completeness_module, "CHANCE_OF_MISSING", 0.05)
    exact = torch.cat([torch.tensor([1.3]), torch.linspace(-1, 1, 399)]).double()
    missed = 0
    for seed in range(300):
        found = lanczos(DenseOperator(torch.diag(exact)), generator=seeded(seed), num_eigenvalues=1, max_steps=8)
        missed += bound_outside(found.ritz[0], -1.0, 400) < 1.3
    assert missed <= 25  # 15 and two and a half standard errors
    assert bound_outside(torch.linspace(-1, 1, 60), -1.0, 400) < 1.1
    assert bound_outside(torch.linspace(-1, 1, 2), -1.0, 400) == torch.inf


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_multiple_of_the_identity(scale: float) -> None:
    result = lanczos(DenseOperator(scale * torch.eye(20)), generator=seeded(), num_eigenvalues=4)
    assert result.converged and result.num_steps - result.num_check_steps == 4
    np.testing.assert_allclose(result.eigenvalues, [scale] * 4, rtol=1e-5)


def test_scaling_the_operator_scales_the_result() -> None:
    matrix = decaying().matrix
    small, large = (lanczos(DenseOperator(factor * matrix), generator=seeded()) for factor in (1e-6, 1e6))
    assert small.num_steps == large.num_steps
    np.testing.assert_allclose(np.array(large.eigenvalues) / 1e12, small.eigenvalues, rtol=1e-9)


def test_min_steps_and_seed() -> None:
    operator = decaying()
    result = lanczos(operator, generator=seeded(), min_steps=40)
    assert result.num_steps - result.num_check_steps == 40 and result.converged
    again = lanczos(operator, generator=seeded(), min_steps=40)
    other = lanczos(operator, generator=seeded(1), min_steps=40)
    assert torch.equal(result.projected, again.projected) and not torch.equal(result.projected, other.projected)


def test_a_small_basis_is_restarted_and_finds_the_same() -> None:
    operator = DenseOperator(symmetric(torch.cat([torch.tensor([12.0, 11.8, 11.5, 11.3, 11.0]), 3 * torch.randn(395)])))
    seen: list[LanczosResult] = []

    def check(result: LanczosResult) -> None:
        seen.append(result)
        # the relation holds at every moment, with the basis as it is then
        m = len(result.projected)
        q = result.basis.combined(torch.eye(m, dtype=torch.float64))
        left = q @ operator.matrix - result.projected @ q
        for tail, remainder in zip(result.tails.T, result.remainders, strict=True):
            left -= tail[:, None] * remainder
        assert float(left.abs().max()) < 1e-10

    whole = lanczos(operator, generator=seeded(), tolerance=1e-6)
    result = lanczos(operator, generator=seeded(), tolerance=1e-6, basis_memory=24 * 400 * 8, on_step=check)
    assert whole.converged and result.converged
    assert whole.num_steps - whole.num_check_steps == len(whole.basis) > 24 >= len(result.basis)
    assert whole.num_steps <= result.num_steps < 3 * whole.num_steps
    np.testing.assert_allclose(result.eigenvalues, whole.eigenvalues, rtol=1e-9)
    assert max(len(found.projected) for found in seen) == 24
    # the density is that of the start vector, from before the first restart
    assert len(result.quadrature) == 24 and not float(result.quadrature.triu(2).abs().max())


def test_restarts_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = decaying()
    expected = lanczos(operator, generator=seeded(), tolerance=1e-8).eigenvalues
    real = Basis.reserve

    def reserve(basis: Basis, most: int = 22) -> bool:
        if len(basis) == most:
            raise torch.OutOfMemoryError("full")
        return real(basis)

    monkeypatch.setattr(Basis, "reserve", reserve)
    result = lanczos(operator, generator=seeded(), tolerance=1e-8)
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=1e-9)
    assert result.converged and len(result.basis) <= 22
    monkeypatch.setattr(Basis, "reserve", lambda basis: reserve(basis, 4))
    with pytest.raises(
        MemoryError, match=r"no memory for more than 4 vectors of 200 numbers\. Analyze fewer parameters"
    ):
        lanczos(operator, generator=seeded())


def test_an_error_names_the_number_of_eigenvalues_that_the_memory_is_enough_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = (1000, torch.float32, torch.device("cpu"))
    module = sys.modules[lanczos.__module__]
    monkeypatch.setattr(module, "available_memory", lambda: 9 * 4000 + 1)
    assert check_basis_memory(None, *given, 6) >= 9
    message = "num_eigenvalues: expected at most 6, got 7: 10 vectors of 1,000 numbers take 40,000 bytes, and 36,001"
    with pytest.raises(ValueError, match=message):
        check_basis_memory(None, *given, 7)
    monkeypatch.setattr(module, "available_memory", lambda: 3 * 4000)
    with pytest.raises(MemoryError, match="no memory for one eigenvalue: 10 vectors of 1,000 numbers take 40,000"):
        check_basis_memory(None, *given, 7)
    with pytest.raises(ValueError, match=r"7, got 20,000\. This is enough for num_eigenvalues = 2\. Pass None"):
        check_basis_memory(20_000, *given, 7)


def test_a_check_makes_room_for_its_vectors() -> None:
    operator = decaying()
    iteration = KrylovIteration(operator, seeded(), 2, 1e-3, 6, None)
    for _ in range(5):
        iteration.step()
        iteration.proceed(0)
    values = iteration.ritz()[0]
    assert iteration.num_spare == 1 and iteration.make_room(2) and len(iteration.basis) == 4
    kept = iteration.ritz()[0]
    np.testing.assert_allclose(kept[-2:], values[-2:], rtol=1e-12)
    assert not iteration.make_room(2)
    q = torch.stack([iteration.basis[i] for i in range(4)])
    rest = torch.stack(iteration.remainders, 1) @ iteration.tails.T
    relation = operator.matrix @ q.T - q.T @ iteration.projected - rest
    assert float(relation.norm()) < 1e-10 * float(operator.matrix.norm())


def test_start_near_the_eigenvectors_saves_steps() -> None:
    operator = decaying()
    cold = lanczos(operator, generator=seeded())
    moved = DenseOperator(operator.matrix + 1e-3 * symmetric(torch.randn(200)))
    warm = lanczos(moved, generator=seeded(), start=cold.vectors().sum(0))
    again = lanczos(moved, generator=seeded())
    assert warm.converged and warm.num_steps < again.num_steps
    np.testing.assert_allclose(warm.eigenvalues, again.eigenvalues, rtol=1e-5)


def test_every_certificate_holds() -> None:
    """Over 200 seeds and whatever number of steps: an exact eigenvalue lies within each residual."""
    for seed in range(200):
        torch.manual_seed(seed)
        exact = torch.cat([10 * torch.rand(4).double(), torch.randn(56).double()])
        operator = DenseOperator(symmetric(exact))
        result = lanczos(operator, generator=seeded(seed), tolerance=10 ** -(1 + seed % 4), max_steps=5 + seed % 30)
        for value, residual in zip(result.eigenvalues, result.residuals, strict=True):
            assert float((exact - value).abs().min()) <= residual * abs(value) + 1e-12
        if result.converged:
            assert max(result.residuals) <= 10 ** -(1 + seed % 4)


# With 13 values of 20 copies, 20 vectors cannot exclude a missing copy in 1,000 steps.
@pytest.mark.parametrize(
    ("num_values", "copies", "num_seeds", "least"), [(6, 20, 20, 20), (13, 8, 5, 1), (13, 20, 1, 0)]
)
def test_multiple_eigenvalues_in_a_basis_that_is_restarted(
    num_values: int, copies: int, num_seeds: int, least: int
) -> None:
    values = torch.arange(num_values, dtype=torch.float64) + 1
    num_converged = 0
    for seed in range(num_seeds):
        torch.manual_seed(seed)
        operator = DenseOperator(symmetric(values.repeat(copies)))
        result = lanczos(operator, generator=seeded(seed), basis_memory=21 * operator.shape[0] * 8, max_steps=1000)
        assert len(result.basis) <= 21
        if result.converged:
            np.testing.assert_allclose(result.eigenvalues, num_values, rtol=1e-3)
            num_converged += 1
    assert num_converged >= least


def test_small_spaces_that_signs_may_not_leave() -> None:
    for seed in range(50):
        for scale in (0.0, 1.0):
            result = lanczos(DenseOperator(scale * torch.eye(4)), generator=seeded(seed), num_eigenvalues=4)
            np.testing.assert_allclose(result.eigenvalues, [scale] * 4, atol=1e-6)


def test_ctrl_c_in_a_restart_waits_for_a_consistent_result(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = DenseOperator(symmetric(torch.cat([torch.tensor([12.0, 11.8, 11.5]), 3 * torch.randn(397)])))
    seen: list[LanczosResult] = []
    real = Basis.replace

    def replace(basis: Basis, coefficients: torch.Tensor) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        real(basis, coefficients)

    monkeypatch.setattr(Basis, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        lanczos(operator, generator=seeded(), tolerance=1e-9, basis_memory=21 * 400 * 8, on_step=seen.append)
    last = seen[-1]
    assert last.num_steps == 21 > len(last.basis)
    for vector, value, reported in zip(last.vectors(), last.eigenvalues, last.residuals, strict=True):
        assert float((operator.matvec(vector) - value * vector).norm()) == pytest.approx(reported * value, rel=1e-6)


def test_certificates_in_float32_hold_in_float64() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        operator = DenseOperator(symmetric(torch.cat([torch.tensor([9.0, 7.0, 4.0]), 0.3 * torch.randn(997)])).float())
        result = lanczos(operator, generator=seeded(seed), num_eigenvalues=3, tolerance=1e-9)
        exact = operator.matrix.double()
        for vector, value, residual in zip(
            result.vectors().double(), result.eigenvalues, result.residuals, strict=True
        ):
            assert float((exact @ vector - value * vector).norm()) <= residual * abs(value)


def test_bad_arguments() -> None:
    operator = DenseOperator(torch.eye(4))
    for number, expected in ((0, "an integer of at least 1"), (5, "1 to 4, .*")):
        with pytest.raises(ValueError, match=f"num_eigenvalues: expected {expected}, got {number}"):
            lanczos(operator, generator=seeded(), num_eigenvalues=number)
    with pytest.raises(ValueError, match="tolerance: expected a finite number above 0, got 0"):
        lanczos(operator, generator=seeded(), num_eigenvalues=2, tolerance=0)
    with pytest.raises(ValueError, match="max_steps: expected at least num_eigenvalues = 2, got 1"):
        lanczos(operator, generator=seeded(), num_eigenvalues=2, max_steps=1)
    for start in (torch.zeros(4), torch.ones(3), torch.full((4,), torch.nan)):
        with pytest.raises(ValueError, match=r"start: expected a finite vector of shape \(4,\) that is not zero, got"):
            lanczos(operator, generator=seeded(), num_eigenvalues=2, start=start)
    with pytest.raises(ValueError, match=r"basis_memory: expected at least 64 bytes, 4 vectors of 4 parameters for"):
        lanczos(operator, generator=seeded(), num_eigenvalues=2, basis_memory=60)
    assert operator.num_products == 0


@pytest.mark.parametrize("gap", [0.0, 1e-8, 1e-6, 1e-3])
def test_two_largest_eigenvalues_that_are_nearly_equal(gap: float) -> None:
    """Of a diagonal matrix with a dense bulk below them, where random signs may miss the second one."""
    exact = torch.cat([torch.tensor([1 + gap, 1.0]).double(), torch.linspace(0, 0.9, 298).double()])
    for seed in range(3):
        result = lanczos(DenseOperator(torch.diag(exact)), generator=seeded(seed), num_eigenvalues=1)
        assert result.converged and result.num_steps < 120
        assert abs(result.eigenvalues[0] - 1 - gap) <= result.residuals[0] + result.margin


def test_the_bound_from_later_steps_holds_and_is_sharper() -> None:
    """Against the exact Schur complement, for a matrix outside that lies below the bound."""
    values = torch.cat([torch.tensor([3.0, 2.0]).double(), torch.linspace(-1, 1, 148).double()])
    operator = DenseOperator(symmetric(values))
    size, level, bound = 12, 1.5, 1.05
    for steps in (size + 2, size + 6):
        found = lanczos(operator, generator=seeded(), num_eigenvalues=2, tolerance=1e-12, max_steps=steps)
        beta = float(found.remainders[0].norm())
        raised = raised_by_chain(found.projected, size, [beta], level, bound)
        basis = found.basis.combined(torch.eye(steps, dtype=torch.float64))[:size]
        outside = torch.eye(150, dtype=torch.float64) - basis.T @ basis
        inverse = torch.linalg.inv(level * torch.eye(150, dtype=torch.float64) - outside @ operator.matrix @ outside)
        exact = basis @ operator.matrix @ outside @ inverse @ outside @ operator.matrix @ basis.T
        difference = raised - found.projected[:size, :size] - exact
        assert float(torch.linalg.eigvalsh(difference)[0]) >= -1e-9
        assert float(difference.norm()) < 0.2 * float(exact.norm())


def test_later_steps_that_are_no_chain_or_contradict_the_bound_prove_nothing() -> None:
    operator = DenseOperator(symmetric(torch.cat([torch.tensor([3.0, 2.0]), torch.linspace(-1, 1, 98)])))
    found = lanczos(operator, generator=seeded(), num_eigenvalues=2, tolerance=1e-12, max_steps=16)
    beta = [float(found.remainders[0].norm())]
    assert raised_by_chain(found.projected, 12, beta, 1.5, 1.05) is not None
    assert raised_by_chain(found.projected, 12, beta, 1.5, float(found.projected[12:, 12:].max()) - 1) is None
    coupled = found.projected.clone()
    coupled[3, 14] = coupled[14, 3] = 0.1
    assert raised_by_chain(coupled, 12, beta, 1.5, 1.05) is None
    assert raised_by_chain(found.projected, 12, [*beta, 0.1], 1.5, 1.05) is None
    # an exhausted iteration needs no bound on what follows
    exact = raised_by_chain(found.projected, 12, [], 1.5, 1.05)
    chain = found.projected[12:, 12:]
    form = torch.linalg.inv(1.5 * torch.eye(len(chain), dtype=torch.float64) - chain)[0, 0]
    couplings = found.projected[:12, 12]
    torch.testing.assert_close(exact, found.projected[:12, :12] + form * couplings.outer(couplings))

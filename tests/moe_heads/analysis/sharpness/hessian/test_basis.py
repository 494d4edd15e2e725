import math

import pytest
import torch

from moe_heads.analysis.sharpness.hessian import basis as basis_module
from moe_heads.analysis.sharpness.hessian.basis import Basis, dot, norm, rademacher


def filled(num_vectors: int, dim: int) -> tuple[Basis, torch.Tensor]:
    rows = torch.linalg.qr(torch.randn(dim, num_vectors, dtype=torch.float64))[0].T
    basis = Basis(dim, torch.float64, torch.device("cpu"))
    for row in rows:
        basis.append(row)
    return basis, rows


def test_combines_over_blocks_of_rows() -> None:
    basis, rows = filled(37, 50)
    coefficients = torch.randn(3, 37, dtype=torch.float64)
    assert len(basis) == 37 and torch.equal(basis[-1], rows[-1]) and torch.equal(basis[20], rows[20])
    torch.testing.assert_close(basis.combined(coefficients), coefficients @ rows)


def test_complement_is_orthogonal_also_for_a_vector_nearly_inside() -> None:
    basis, rows = filled(37, 50)
    outside = basis.complement(torch.randn(50, dtype=torch.float64))
    nearly_inside = rows.sum(0) + 1e-10 * outside
    left = basis.complement(nearly_inside)
    assert (rows @ left).abs().max() < 1e-12 * left.norm()
    torch.testing.assert_close(left, 1e-10 * outside, rtol=1e-2, atol=0)


def test_signs_repeat_with_the_generator_and_are_balanced() -> None:
    device = torch.device("cpu")
    first, again = (rademacher(10_000, torch.float32, device, torch.Generator().manual_seed(seed)) for seed in (3, 3))
    other = rademacher(10_000, torch.float32, device, torch.Generator().manual_seed(4))
    assert torch.equal(first, again) and torch.equal(first.abs(), torch.ones(10_000))
    assert abs(first.mean()) < 0.04 and abs((first * other).mean()) < 0.04  # four standard errors


def test_replaced_by_combinations_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basis_module, "_COLUMNS", 7)
    basis, rows = filled(37, 50)
    rotation = torch.linalg.qr(torch.randn(37, 37, dtype=torch.float64))[0][:20]
    basis.replace(rotation)
    assert len(basis) == 20
    torch.testing.assert_close(basis.combined(torch.eye(20)), rotation @ rows)
    basis.append(torch.ones(50, dtype=torch.float64))
    assert len(basis) == 21 and torch.equal(basis[-1], torch.ones(50, dtype=torch.float64))


def test_gram_on_some_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basis_module, "_COLUMNS", 7)
    basis, rows = filled(18, 50)
    other = torch.randn(50, dtype=torch.float64)
    inside = torch.cat([rows, other[None]])[:, [*range(3, 20), *range(30, 31)]]
    torch.testing.assert_close(basis.gram([slice(3, 20), slice(30, 31)], [other]), inside @ inside.T)
    torch.testing.assert_close(basis.gram([slice(0, 50)]), torch.eye(18, dtype=torch.float64))


def test_dot_sums_in_float64() -> None:
    # In float32 the pieces of the sum vanish next to 2^41.
    left = torch.ones(4 * 2**16)
    left[0] = 2.0**41
    assert dot(left, torch.ones_like(left)) == pytest.approx(2.0**41 + 3 * 2.0**16, rel=1e-12)
    assert norm(torch.tensor([3.0, 4.0])) == 5.0


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-15, 1.0, 1e30])
def test_norm_of_any_scale(scale: float) -> None:
    vector = torch.tensor([3.0, 0.0, 4.0]) * scale
    assert norm(vector) == pytest.approx(5 * scale, rel=1e-6)
    assert norm(torch.tensor([1.0, float("inf")])) == float("inf")
    assert math.isnan(norm(torch.tensor([1.0, float("nan")])))


def test_long_vectors_are_orthogonalized_by_columns() -> None:
    dim = 2**18 + 5
    generator = torch.Generator().manual_seed(0)
    basis = Basis(dim, torch.float32, torch.device("cpu"))
    for _ in range(3):
        vector = basis.complement(torch.randn(dim, generator=generator), in_place=True)
        basis.append(vector, float(vector.norm()))
    vectors = torch.randn(2, dim, generator=generator)
    rows = torch.stack([basis[i] for i in range(3)]).double()
    rest, coefficients = basis.split(vectors)
    torch.testing.assert_close(coefficients, vectors.double() @ rows.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(rest.double(), vectors.double() - coefficients @ rows, rtol=0, atol=1e-6)
    assert float((rest.double() @ rows.T).abs().max()) < 1e-4

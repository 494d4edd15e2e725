import torch

from moe_heads.callbacks.functional.curvature.basis import Basis, dot, norm, rademacher


def filled(num_vectors: int, dim: int) -> tuple[Basis, torch.Tensor]:
    rows = torch.linalg.qr(torch.randn(dim, num_vectors, dtype=torch.float64))[0].T
    basis = Basis(dim, torch.float64, torch.device("cpu"))
    for row in rows:
        basis.append(row)
    return basis, rows


def test_combines_over_blocks_of_rows() -> None:
    basis, rows = filled(37, 50)
    coefficients = torch.randn(3, 37, dtype=torch.float64)
    assert len(basis) == 37 and torch.equal(basis.last, rows[-1])
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


def test_dot_sums_in_float64() -> None:
    # In float32 the small terms vanish next to 2^24 if they are added one by one.
    left = torch.ones(2**16 + 1)
    left[0] = 2.0**24
    assert dot(left, torch.ones_like(left)) == 2.0**24 + 2.0**16
    assert norm(torch.tensor([3.0, 4.0])) == 5.0

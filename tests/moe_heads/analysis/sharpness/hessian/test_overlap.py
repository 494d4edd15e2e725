import pytest
import torch

from moe_heads.analysis.sharpness.hessian import subspace_overlap


def test_same_orthogonal_and_random_spaces() -> None:
    basis = torch.linalg.qr(torch.randn(100, 100, dtype=torch.float64))[0].T
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    assert subspace_overlap(basis[:5], rotation @ basis[:5]) == pytest.approx(1)
    assert subspace_overlap(basis[:5], basis[5:10]) == pytest.approx(0, abs=1e-20)
    others = [torch.linalg.qr(torch.randn(100, 5, dtype=torch.float64))[0].T for _ in range(200)]
    mean = sum(subspace_overlap(basis[:5], other) for other in others) / 200
    assert mean == pytest.approx(5 / 100, rel=0.1)
    with pytest.raises(ValueError, match=r"second: expected the shape of the first, \(5, 100\), got \(4, 100\)"):
        subspace_overlap(basis[:5], basis[:4])

"""The top eigenvector by itself."""

import torch
from torch import nn
from torch.nn import functional as F

from moe_heads.analysis import sharpness
from moe_heads.analysis.sharpness.hessian import top_eigenvector


def test_is_that_of_the_sharpness_analysis_and_a_unit_vector() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batches = [(torch.randn(size, 4).double(), torch.randint(3, (size,))) for size in (7, 12)]

    def loss_fn(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    vector = top_eigenvector(model, loss_fn, batches, tolerance=1e-8)
    expected = sharpness(model, loss_fn, batches, num_eigenvalues=1, tolerance=1e-8, keep_eigenvectors=True)
    torch.testing.assert_close(vector.norm(), torch.tensor(1.0).double())
    torch.testing.assert_close((vector @ expected.eigenvectors[0]).abs(), torch.tensor(1.0).double())

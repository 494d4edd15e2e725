"""The top eigenvalue against PyHessian, an independent implementation."""

import pytest
import torch
from pyhessian import hessian
from torch import nn
from torch.nn import functional as F

from moe_heads.analysis import sharpness


# raised inside PyHessian, which leaves the graph in .grad
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_top_eigenvalue_is_that_of_pyhessian() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    x, y = torch.randn(50, 4), torch.randint(3, (50,))
    result = sharpness(model, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), [(x, y)], num_eigenvalues=1)
    theirs = hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=False)
    (found,), _ = theirs.eigenvalues(maxIter=500, tol=1e-6)
    assert result.eigenvalues[0] == pytest.approx(found, rel=1e-3)

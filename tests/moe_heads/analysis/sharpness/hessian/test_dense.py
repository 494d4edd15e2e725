"""The whole matrix of a small model: exact, deterministic, and not more products than the other way."""

import pytest
import torch
from torch import Tensor, nn

from moe_heads.analysis import sharpness
from moe_heads.analysis.sharpness.hessian import lanczos
from moe_heads.analysis.sharpness.hessian.dense import completed, dense
from moe_heads.analysis.sharpness.hessian.krylov import LanczosResult
from moe_heads.analysis.sharpness.hessian.trace import deflated_trace
from tests.support.hessians import DenseOperator, dense_hessian, symmetric


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def data() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    return [(x[:25], y[:25]), (x[25:], y[25:])]


def network(width: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.mark.parametrize("values", [torch.linspace(-1, 2, 30), torch.tensor([3.0] * 4 + [0.0] * 20 + [-1.0])])
def test_all_eigenvalues_of_a_matrix_with_copies_and_zeros(values: Tensor) -> None:
    parts = symmetric(values.double()), symmetric(torch.linspace(0, 1, len(values)).double())
    operator = DenseOperator(*parts)
    seen: list[LanczosResult] = []
    found = dense(operator, num_eigenvalues=3, tolerance=1e-6, on_step=seen.append)
    expected = torch.linalg.eigvalsh(operator.matrix)
    torch.testing.assert_close(found.ritz[0], expected, rtol=0, atol=1e-12)
    assert found.is_whole and found.converged and operator.num_products == len(values)
    trace = deflated_trace(operator, found, generator=torch.Generator(), blocks={"a": [slice(0, 7), slice(9, 12)]})
    assert (trace.estimate, trace.stderr, trace.num_probes) == (pytest.approx(float(expected.sum())), 0, 0)
    diagonal = operator.matrix.diagonal()
    assert trace.blocks["a"].estimate == pytest.approx(float(diagonal[:7].sum() + diagonal[9:12].sum()))
    torch.testing.assert_close(found.forms.sum(0), torch.stack([part.trace() for part in parts]))
    # the results on the way are bounds, and know that they are not complete
    first = seen[0]
    assert not first.is_complete and len(first.projected) == 10
    vector = first.vectors()[0]
    residual = operator.matrix @ vector - first.eigenvalues[0] * vector
    assert float(residual.norm()) == pytest.approx(first.residuals[0] * abs(first.eigenvalues[0]), rel=1e-6)


def test_a_matrix_that_is_not_symmetric_shows_it() -> None:
    matrix = torch.randn(12, 12, dtype=torch.float64)
    found = dense(DenseOperator(matrix))
    assert found.asymmetry == pytest.approx(float(torch.linalg.matrix_norm((matrix - matrix.T) / 2, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_krylov_space_is_completed(dtype: torch.dtype) -> None:
    operator = DenseOperator(symmetric(torch.linspace(-1, 1, 50), dtype), symmetric(torch.linspace(-1, 2, 50), dtype))
    krylov = lanczos(operator, generator=torch.Generator().manual_seed(0), num_eigenvalues=2)
    before = operator.num_products
    found = completed(operator, krylov)
    assert operator.num_products == before + 50 - len(krylov.projected) == found.num_steps
    expected = torch.linalg.eigvalsh(operator.matrix.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(found.ritz[0], expected, rtol=0, atol=tolerance)
    vectors = found.vectors().double()
    residuals = (
        vectors @ operator.matrix.double() - torch.tensor(found.eigenvalues, dtype=torch.float64)[:, None] * vectors
    )
    assert float(residuals.norm()) < 10 * tolerance
    assert float(found.forms.sum()) == pytest.approx(float(expected.sum()), abs=1e-4)


@pytest.mark.parametrize(("width", "density"), [(5, True), (12, True), (4, False)])
def test_small_networks_have_exact_results(width: int, density: bool) -> None:
    model = network(width)
    size = sum(p.numel() for p in model.parameters())
    if width == 4:
        options: dict[str, list[str]] = {"params": ["0", "2.bias"]}
        size -= 4 * 3
    else:
        options = {}
    found = sharpness(model, cross_entropy, data(), density=density, max_probes=8, **options)
    again = sharpness(model, cross_entropy, data(), density=density, max_probes=8, seed=5, **options)
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    whole = dense_hessian(model.double(), cross_entropy, (x.double(), y))
    kept = [*range(4 * width + width), *range(len(whole) - 3, len(whole))] if options else [*range(len(whole))]
    expected = torch.linalg.eigvalsh(whole[kept][:, kept])
    assert found.eigenvalues == pytest.approx(expected.flip(0)[:5].tolist(), rel=1e-4)
    assert found.lambda_min == pytest.approx(float(expected[0]), rel=1e-4, abs=1e-6)
    assert found.trace == pytest.approx(float(expected.sum()), rel=1e-5)
    if size <= (100 if density else 40):
        assert found.num_products == size + 1 and found.num_probes == 0
        assert again.eigenvalues == found.eigenvalues and again.trace == found.trace  # nothing is random
        assert found.trace_converged and found.trace_stderr < 1e-5 * found.frobenius_norm
    if density:
        assert found.density is not None
        torch.testing.assert_close(found.density.nodes, expected, rtol=0, atol=1e-5)


class Form(nn.Module):
    """A loss with a given Hessian."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.weight = nn.Parameter(torch.ones(len(matrix), dtype=matrix.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean() * (self.weight @ self.matrix @ self.weight) / 2


def test_probes_that_would_not_converge_give_way_to_the_matrix() -> None:
    torch.manual_seed(0)
    values = torch.linspace(-1, 1, 170).double()
    values[-5:] += torch.arange(5).double()
    model, batches = Form(symmetric(values)), [torch.ones(8).double()]
    options = {"num_eigenvalues": 2, "trace_tolerance": 0.02}
    found = sharpness(model, lambda m, x: m(x), batches, **options)
    assert found.num_probes == 16 and found.num_products < 210
    assert found.converged and found.trace == pytest.approx(float(values.sum()), abs=1e-8)
    assert found.density is not None and bool(
        (found.density.nodes.sort().values - values.sort().values).abs().max() < 1e-8
    )
    # not where the number of products is limited
    limited = sharpness(model, lambda m, x: m(x), batches, max_steps=80, max_probes=20, **options)
    assert limited.num_products < 110 and not limited.trace_converged

"""What `converged` promises, on inputs where a Krylov method alone would promise too much."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from moe_heads.analysis import Progress, sharpness
from tests.support.hessians import Batch, classification, cross_entropy, dense_hessian, small_mlp


def dense(model: nn.Module, loss_fn: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> Tensor:
    return dense_hessian(copy.deepcopy(model).double().eval(), loss_fn, (batch[0].double(), batch[1]))


def test_values_that_the_loss_reads_in_python_are_those_of_each_batch() -> None:
    costs = {0: 1.0, 1: 5.0, 2: 0.2}

    def weighted(m: nn.Module, batch: Batch) -> Tensor:
        cost = torch.tensor([costs[label] for label in batch[1].tolist()], dtype=batch[0].dtype)
        return (cost * F.cross_entropy(m(batch[0]), batch[1], reduction="none")).mean()

    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 3))
    x, y = classification(60, 1, 8, 8, dtype=torch.float32)
    y = y.sort().values
    batches = list(zip(x.split(20), y.split(20), strict=True))
    kept, rebuilt = (sharpness(model, weighted, batches, graph_memory=memory) for memory in (None, 0))
    assert (kept.graph_mode, rebuilt.graph_mode) == ("kept", "rebuilt")
    labels = {len(batch_y.unique()) for _, batch_y in batches}
    assert labels != {3}  # the first batch has not all classes
    whole = sharpness(copy.deepcopy(model).double(), weighted, [(x.double(), y)])
    np.testing.assert_allclose(kept.eigenvalues, whole.eigenvalues, rtol=1e-3)
    np.testing.assert_allclose(rebuilt.eigenvalues, whole.eigenvalues, rtol=1e-3)


def test_eigenvalues_that_float32_does_not_resolve_are_no_certificate() -> None:
    """Linear regression on features that are not normalized: 7e6 and 10."""
    low, high = torch.tensor([1.0, 0, 3, 0.8, 200, 2, 33, -124]), torch.tensor([7.0, 50, 7, 1.3, 3200, 4, 41, -115])
    x = low + (high - low) * torch.rand(400, 8)
    y = 0.4 * x[:, :1] - 0.01 * x[:, 1:2]

    def loss(m: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(m(batch[0]), batch[1])

    features = torch.cat([x, torch.ones(400, 1)], 1).double()
    true = torch.linalg.eigvalsh(2 * features.T @ features / 400).flip(0)[:5].tolist()
    model = nn.Linear(8, 1)
    with pytest.warns(UserWarning, match="λ5 did not converge: float32 does not resolve eigenvalues of this size"):
        single = sharpness(model, loss, [(x, y)])
    assert not single.eigenvalues_converged and single.metrics()["converged"] == 0
    assert "float32 does not resolve eigenvalues of this size" in single.summary()
    for value, residual, exact in zip(single.eigenvalues, single.residuals, true, strict=True):
        assert residual > 1e-3 or abs(value - exact) <= residual * abs(value)
    double = sharpness(model.double(), loss, [(x.double(), y.double())])
    assert double.eigenvalues_converged
    np.testing.assert_allclose(double.eigenvalues, true, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"density": False}, {"num_eigenvalues": 8}, {"basis_memory": 2**17}])
def test_all_copies_of_the_eigenvalues_of_a_head_under_mse(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Each eigenvalue is there once for every output."""
    model = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 7)).to(dtype)
    x, y = torch.randn(200, 6, dtype=dtype), torch.randn(200, 7, dtype=dtype)
    features = torch.cat([model[:2](x).detach(), torch.ones(200, 1)], 1).double()
    true = torch.linalg.eigvalsh(2 * features.T @ features / (200 * 7)).flip(0).repeat_interleave(7)
    result = sharpness(model, lambda m, b: F.mse_loss(m(b[0]), b[1]), [(x, y)], params=["2"], **options)
    assert result.eigenvalues_converged and result.certificate is not None and result.certificate.is_complete
    np.testing.assert_allclose(result.eigenvalues, true[: len(result.eigenvalues)], rtol=1e-4)


@pytest.mark.parametrize("params", [None, ["1", "2"]])
def test_reentrant_checkpoints_are_refused_for_a_part_of_the_parameters_too(params: list[str] | None) -> None:
    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self[0](x).relu()
            return self[2](checkpoint(self[1], hidden, use_reentrant=True))

    model = Net(nn.Linear(5, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 3))
    batch = classification(20, 5, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"model: expected checkpoint\(..., use_reentrant=False\)"):
        sharpness(model, cross_entropy, [batch], params=params)


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is not one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 0.5 * grad


class _Rounded(nn.Module):
    """A straight-through estimator."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        return self.b(hidden + ((4 * hidden).round() / 4 - hidden).detach())


def detached(m: nn.Module, batch: Batch) -> Tensor:
    logits = m(batch[0])
    focus = 1 - logits.softmax(1).gather(1, batch[1][:, None])[:, 0].detach()
    return (focus * F.cross_entropy(logits, batch[1], reduction="none")).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("make", "loss_fn"),
    [
        (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), _Module(_Scaled.apply), nn.Linear(6, 3)), cross_entropy),
        (_Rounded, cross_entropy),
        (lambda: small_mlp(torch.float32), detached),
    ],
    ids=["scaled backward", "straight through", "detached"],
)
def test_a_gradient_that_is_not_the_derivative_is_told(
    make: Callable[[], nn.Module], loss_fn: Callable[[nn.Module, Batch], Tensor], dtype: torch.dtype
) -> None:
    batch = classification(40, 5, dtype=dtype)
    with pytest.warns(UserWarning, match="The gradient is not the derivative of the loss"):
        result = sharpness(make().to(dtype), loss_fn, [batch])
    assert not result.eigenvalues_converged and not result.trace_converged


class _Module(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.filterwarnings("ignore:.*float32 does not resolve eigenvalues of this size")
@pytest.mark.parametrize("steps", [100, 400])
def test_rounding_of_a_fitted_model_is_part_of_the_errors(steps: int) -> None:
    """Down to losses that float32 hardly knows."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(60, 4)
    batch = x, x[:, :3].argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        model[2].weight *= 1 + steps / 300
    exact = dense(model, cross_entropy, batch)
    true = torch.linalg.eigvalsh(exact).flip(0)
    result = sharpness(model, cross_entropy, [batch])
    for value, residual, right in zip(result.eigenvalues, result.residuals, true.tolist(), strict=False):
        assert abs(value - right) <= residual * abs(value)
    assert abs(result.trace - float(exact.trace())) <= 4 * result.trace_stderr


def test_an_operation_whose_second_derivative_is_wrong_is_not_certified() -> None:
    """torch's weight_norm: its double backward is not symmetric."""
    model = weight_norm(nn.Linear(4, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    with pytest.warns(UserWarning, match="The products are not symmetric"):
        result = sharpness(model, lambda m, x: m(x).tanh().square().mean(), [torch.randn(7, 4).double()])
    assert not result.eigenvalues_converged and not result.trace_converged


@pytest.mark.parametrize("params", [["head"], ["first.0.weight"], ["second.0.bias"]])
def test_checkpoints_that_are_computed_once_more_find_the_same_parameters(params: list[str]) -> None:
    class Net(nn.Module):
        recomputes = True

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(5, 10), nn.Tanh())
            self.second = nn.Sequential(nn.Linear(10, 8), nn.SiLU())
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            if not self.recomputes:
                return self.head(self.second(self.first(x)))
            inner = checkpoint(self.first, x, use_reentrant=False)
            return self.head(checkpoint(self.second, inner, use_reentrant=False))

    model, batch = Net().double(), classification(20, 5)
    found = sharpness(model, cross_entropy, [batch], params=params, num_eigenvalues=2)
    model.recomputes = False
    plain = sharpness(model, cross_entropy, [batch], params=params, num_eigenvalues=2)
    np.testing.assert_allclose(found.eigenvalues, plain.eigenvalues, rtol=1e-6)


def test_a_loss_that_draws_random_numbers_says_what_is_not_checked() -> None:
    def noisy(m: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(m(batch[0] + 0.1 * torch.randn_like(batch[0])), batch[1])

    result = sharpness(small_mlp(torch.float32), noisy, [classification(30, 5, dtype=torch.float32)])
    assert result.certificate is not None and result.eigenvalues_converged
    assert math.isnan(result.certificate.rounding)
    assert "not checked: the loss draws random numbers" in result.summary()


@pytest.mark.slow
def test_sampling_errors_are_those_of_other_draws() -> None:
    """Over 60 draws of a population: the spread of λ1 and of the trace is what each draw says of itself."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False).double()
    scales = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    found = []
    for _ in range(60):
        x = scales * torch.randn(160, 3, dtype=torch.float64)
        batches = [(part, torch.zeros(len(part), 1, dtype=torch.float64)) for part in x.split(10)]
        result = sharpness(model, lambda m, b: F.mse_loss(m(b[0]), b[1]), batches, num_eigenvalues=1)
        found.append((
            result.eigenvalues[0],
            result.trace,
            result.lambda_max_sampling_stderr,
            result.trace_sampling_stderr,
        ))
    top, trace, top_error, trace_error = np.array(found).T
    # sixty values know their spread to 9 %, the reported ones are widened for 16 groups
    assert np.sqrt(np.mean(top_error**2)) == pytest.approx(top.std(), rel=0.35)
    assert np.sqrt(np.mean(trace_error**2)) == pytest.approx(trace.std(), rel=0.35)


def test_too_few_batches_have_no_sampling_error() -> None:
    model, (x, y) = small_mlp(), classification(30, 5)
    batches = list(zip(x.split(10), y.split(10), strict=True))
    result = sharpness(model, cross_entropy, batches)
    assert math.isnan(result.lambda_max_sampling_stderr) and "λ1, over samples" not in result.summary()
    assert "lambda_max_sampling_stderr" not in result.metrics()


@pytest.mark.filterwarnings("ignore:.*float64 does not resolve eigenvalues of this size.*Raise the tolerance")
@pytest.mark.parametrize("options", [{}, {"num_eigenvalues": 40, "tolerance": 1e-9}])
def test_two_standard_errors_cover_the_density(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x = torch.randn(120, 6, dtype=torch.float64)
    batch = x, x[:, :3].argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    exact = torch.linalg.eigvalsh(dense(model, cross_entropy, batch))
    covered = []
    for seed in range(10):
        density = sharpness(model, cross_entropy, [batch], seed=seed, trace_tolerance=10.0, **options).density
        assert density is not None
        spread = -((density.grid[:, None] - exact) ** 2) / (2 * density.sigma**2)
        true = spread.exp().sum(1) / (len(exact) * density.sigma * math.sqrt(2 * math.pi))
        inside = (density.values - true).abs() <= 2 * density.stderr
        covered.append(float(inside[true > 1e-3 * true.max()].double().mean()))
        assert float(density.values.sum() * (density.grid[1] - density.grid[0])) == pytest.approx(1, rel=1e-6)
    assert np.mean(covered) >= 0.95, covered


def test_a_first_value_comes_from_the_first_batches() -> None:
    model, (x, y) = small_mlp(torch.float32), classification(50, 5, dtype=torch.float32)
    batches = list(zip(x.split(10), y.split(10), strict=True))
    result = sharpness(model, cross_entropy, batches, progress=Progress(1e-9))
    assert result.partial and result.num_samples == 10 and not result.converged
    assert f"**Partial**: {result.partial}, with 10 samples." in result.summary()
    exact = dense(model, cross_entropy, batches[0])
    distance = (torch.linalg.eigvalsh(exact) - result.eigenvalues[0]).abs().min()
    assert float(distance) <= result.residuals[0] * abs(result.eigenvalues[0])


def test_the_basis_stays_within_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_heads.analysis.sharpness.hessian.basis import Basis

    longest = 0
    real = Basis.append

    def append(basis: Basis, vector: Tensor, length: float = 1.0) -> None:
        nonlocal longest
        real(basis, vector, length)
        longest = max(longest, len(basis))

    monkeypatch.setattr(Basis, "append", append)
    model, batch = small_mlp(), classification(60, 5)
    roomy = sharpness(model, cross_entropy, [batch], density=False)
    assert longest > 9
    longest = 0
    tight = sharpness(model, cross_entropy, [batch], density=False, basis_memory=9 * 57 * 8)
    assert longest <= 9 and tight.eigenvalues_converged
    np.testing.assert_allclose(tight.eigenvalues, roomy.eigenvalues, rtol=1e-3)
    exact = torch.linalg.eigvalsh(dense_hessian(model, cross_entropy, batch)).flip(0)[:5]
    np.testing.assert_allclose(tight.eigenvalues, exact, rtol=1e-4)
    with pytest.raises(ValueError, match="basis_memory: expected at least 3,648 bytes, 8 vectors of 57 parameters"):
        sharpness(model, cross_entropy, [batch], basis_memory=7 * 57 * 8)


def test_too_few_steps_for_the_search_of_missing_eigenvalues() -> None:
    with pytest.warns(
        UserWarning, match=r"could not exclude a missing larger eigenvalue.*Raise max_steps or basis_mem"
    ):
        result = sharpness(small_mlp(), cross_entropy, [classification(60, 5)], density=False, max_steps=33)
    assert not result.eigenvalues_converged and max(result.residuals) < 1e-3


def test_no_check_warns_on_a_plain_network() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = sharpness(small_mlp(torch.float32), cross_entropy, [classification(30, 5, dtype=torch.float32)])
    assert result.certificate is not None and not result.certificate.unchecked

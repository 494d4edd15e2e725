import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from pyhessian import hessian
from torch import Tensor, nn

from moe_heads.analysis import sharpness
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis.sharpness.pyhessian import pyhessian_sharpness
from moe_heads.analysis.sharpness.result import SharpnessResult
from tests.support.hessians import classification, cross_entropy, dense_hessian, small_cnn, small_mlp
from tests.support.untouched import untouched

# raised inside PyHessian, which leaves the graph in .grad, when a test runs it without the adapter
pyhessian_alone = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


class Diagonal(nn.Module):
    """A quadratic loss whose Hessian is diagonal."""

    def __init__(self, *eigenvalues: float, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(len(eigenvalues), dtype=dtype))
        self.eigenvalues = torch.tensor(eigenvalues, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return (self.eigenvalues * self.w.square()).sum() / 2 * x.mean()


def output(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


ONES = [torch.ones(4, 1, dtype=torch.float64)]


def half_square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(batch[0]).square().mean() / 2


def failures(found: SharpnessResult, about: str) -> list[str]:
    return [sentence for sentence in found.failures if sentence.startswith(f"{about}: ")]


def assert_residuals_are_those_of(matrix: Tensor, found: SharpnessResult) -> None:
    """The residuals are those of the dense matrix, and each bounds the distance to one of its eigenvalues."""
    exact = torch.linalg.eigvalsh(matrix)
    for value, residual, vector in zip(found.eigenvalues, found.residuals, found.eigenvectors, strict=True):
        assert residual == pytest.approx(float((matrix @ vector - value * vector).norm()) / abs(value), rel=1e-6)
        assert float((exact - value).abs().min()) <= residual * abs(value) + 1e-12


def test_easy_spectrum_equals_dense_hessian() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    rotation, _ = torch.linalg.qr(torch.randn(20, 3, dtype=torch.float64))
    batch = (rotation * torch.tensor([100.0, 10.0, 1.0]).sqrt() * 20**0.5, torch.zeros(20))
    matrix = dense_hessian(model, half_square, batch)
    found = pyhessian_sharpness(model, half_square, [batch], num_eigenvalues=3)
    assert found.eigenvalues == pytest.approx([100.0, 10.0, 1.0], rel=2e-3)
    assert found.eigenvectors.abs().diagonal().tolist() == pytest.approx([1.0] * 3, abs=1e-3)
    assert found.trace == pytest.approx(111.0, abs=max(4 * found.trace_stderr, 1e-6))
    assert_residuals_are_those_of(matrix, found)


def test_residuals_are_true_where_the_iteration_stopped_early() -> None:
    model, batch = small_mlp(), classification(40, 5)
    found = pyhessian_sharpness(model, cross_entropy, [batch])
    assert_residuals_are_those_of(dense_hessian(model, cross_entropy, batch), found)
    assert max(found.residuals) > 1e-3
    (sentence,) = failures(found, "residual")
    assert f"λ1 {found.residuals[0]:.1e}" in sentence
    assert found.eigenvectors.norm(dim=1).tolist() == pytest.approx([1.0] * 5, abs=1e-12)
    assert found.parameter_names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert (found.num_samples, found.num_parameters) == (40, 57)


@pyhessian_alone
def test_numbers_are_pyhessians_own() -> None:
    model, (x, y) = small_mlp(torch.float32), classification(25, 5, dtype=torch.float32)
    parts = list(zip(x.split([12, 12, 1]), y.split([12, 12, 1]), strict=True))
    found = pyhessian_sharpness(model, cross_entropy, parts, num_eigenvalues=3, seed=7)
    torch.manual_seed(7)
    theirs = hessian(model, nn.CrossEntropyLoss(), dataloader=parts, cuda=False)
    eigenvalues, vectors = theirs.eigenvalues(top_n=3)
    samples = torch.tensor(theirs.trace(), dtype=torch.float64)
    assert found.eigenvalues == tuple(eigenvalues)
    flat = torch.stack([torch.cat([part.reshape(-1) for part in vector]) for vector in vectors])
    torch.testing.assert_close(found.eigenvectors, F.normalize(flat))
    assert (found.trace, found.num_probes) == (float(samples.mean()), len(samples))
    assert found.trace_stderr == pytest.approx(float(samples.std()) / len(samples) ** 0.5)


@pyhessian_alone
def test_top_eigenvalue_of_our_own_engine_is_that_of_pyhessian() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    x, y = torch.randn(50, 4), torch.randint(3, (50,))
    result = sharpness(model, cross_entropy, [(x, y)], num_eigenvalues=1)
    theirs = hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=False)
    (found,), _ = theirs.eigenvalues(maxIter=500, tol=1e-6)
    assert result.eigenvalues[0] == pytest.approx(found, rel=1e-3)


def test_uneven_batches_equal_one_batch() -> None:
    model, (x, y) = small_mlp(), classification(25, 5)
    whole = pyhessian_sharpness(model, cross_entropy, [(x, y)])
    split = pyhessian_sharpness(model, cross_entropy, zip(x.split([12, 12, 1]), y.split([12, 12, 1]), strict=True))
    assert split.eigenvalues == pytest.approx(whole.eigenvalues, rel=1e-9)
    assert split.trace == pytest.approx(whole.trace, rel=1e-9)
    assert (split.num_products, split.num_samples) == (whole.num_products, 25)


def test_equal_seeds_give_equal_results() -> None:
    model, batch = small_mlp(torch.float32), classification(20, 5, dtype=torch.float32)

    def run(seed: int) -> SharpnessResult:
        torch.rand(3)  # the previous state of the generators must not matter
        return pyhessian_sharpness(model, cross_entropy, [batch], num_eigenvalues=2, seed=seed)

    first, again, other = run(1), run(1), run(2)
    assert (first.eigenvalues, first.trace) == (again.eigenvalues, again.trace)
    assert torch.equal(first.eigenvectors, again.eigenvectors)
    assert (first.eigenvalues, first.trace) != (other.eigenvalues, other.trace)


def test_batches_of_any_kind() -> None:
    model, (x, y) = small_mlp(), classification(20, 5)

    def loss(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(m(batch["image"]), batch["label"])

    mapping = pyhessian_sharpness(model, loss, [{"image": x, "label": y}])
    pair = pyhessian_sharpness(model, cross_entropy, [(x, y)])
    assert mapping.eigenvalues == pair.eigenvalues


# --- parameters that crash PyHessian


class Experts(nn.Module):
    """Two experts chosen by the sign of an input, an idle expert, and a shift of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(3))
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 3)
        for chosen, expert in zip((x[:, 0] > 0, x[:, 0] <= 0), self.experts, strict=False):
            if chosen.any():
                out = out.index_put((chosen,), expert(x[chosen]).tanh())
        return out


def shifted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model, batch) + model.shift


@pyhessian_alone
def test_idle_and_linear_parameters_get_zero_rows_and_are_named() -> None:
    model, (x, y) = Experts().double(), classification(30, 5)
    one_sided = (x[:, 0] > 0, x[:, 0] <= 0)
    with pytest.raises(AssertionError):
        hessian(model, nn.CrossEntropyLoss(), dataloader=[(x, y)], cuda=False).eigenvalues()
    whole = pyhessian_sharpness(model, shifted, [(x, y)], num_eigenvalues=3)
    split = pyhessian_sharpness(model, shifted, [(x[side], y[side]) for side in one_sided], num_eigenvalues=3)
    assert whole.eigenvalues == pytest.approx(split.eigenvalues, rel=1e-9)
    assert not whole.eigenvectors[:, 0].any() and not whole.eigenvectors[:, 37:].any()
    assert whole.eigenvectors[:, 1:19].any() and whole.eigenvectors[:, 19:37].any()
    exact = Experts().double()
    exact.load_state_dict(model.state_dict())

    def loss_of(flat: Tensor) -> Tensor:
        values = {name: flat[1:][i * 18 : i * 18 + 18] for i, name in enumerate("ab")}
        logits = [x @ v[:15].view(3, 5).T + v[15:] for v in values.values()]
        return F.cross_entropy(torch.where(x[:, :1] > 0, *logits).tanh(), y) + flat[0]

    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])[:37]
    matrix = F.pad(torch.func.hessian(loss_of)(flat), (0, 18, 0, 18))
    assert_residuals_are_those_of(matrix, whole)
    (idle,), (linear,) = failures(whole, "idle parameter"), failures(whole, "linear parameter")
    assert "experts.2.weight and 1 more" in idle and "shift" in linear
    assert "experts.0.weight and 5 more" in failures(split, "idle parameter")[0]


def test_frozen_parameters_and_a_choice_of_parameters() -> None:
    model, batch = small_mlp(), classification(40, 5)
    matrix = dense_hessian(model, cross_entropy, batch)[36:, 36:]
    with untouched(model):
        chosen = pyhessian_sharpness(model, cross_entropy, [batch], params=list(model[2].parameters()))
    model[0].requires_grad_(False)
    with untouched(model):
        frozen = pyhessian_sharpness(model, cross_entropy, [batch])
    assert frozen.eigenvalues == chosen.eigenvalues
    assert frozen.parameter_names == chosen.parameter_names == ("2.weight", "2.bias")
    assert_residuals_are_those_of(matrix, frozen)


class Scaled(nn.Module):
    """A loss with its own parameter, which has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.scale.grad = torch.full((), 3.0, dtype=torch.float64)

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.scale * cross_entropy(model, batch)


def test_parameters_of_a_loss_that_is_a_module_are_not_the_models() -> None:
    model, batch, loss = small_mlp(), classification(20, 5), Scaled()
    grad = loss.scale.grad
    found = pyhessian_sharpness(model, loss, [batch], num_eigenvalues=2)
    assert found.eigenvalues == pyhessian_sharpness(model, cross_entropy, [batch], num_eigenvalues=2).eigenvalues
    assert loss.scale.grad is grad and grad is not None and float(grad) == 3.0 and not grad.requires_grad


# --- known failures of its numbers


def test_order_is_pyhessians_and_a_wrong_one_is_named() -> None:
    model = Diagonal(*(1 - 0.01 * i for i in range(40)), dtype=torch.float32)
    data = [torch.ones(4, 1)]
    runs = [pyhessian_sharpness(model, output, data, num_eigenvalues=2, density=False, seed=seed) for seed in range(6)]
    swapped = [run for run in runs if run.eigenvalues[0] < run.eigenvalues[1]]
    assert 0 < len(swapped) < 6
    for run in runs:
        assert [s[:16] for s in failures(run, "order")] == ["order: λ1 < λ2 ("] * (run in swapped)


def test_negative_eigenvalue_and_negative_trace_are_named() -> None:
    found = pyhessian_sharpness(Diagonal(-8.0, 2.0, 1.0), output, ONES, num_eigenvalues=2)
    assert found.eigenvalues == pytest.approx([-8.0, 2.0], rel=0.01)
    assert failures(found, "sign")[0].startswith("sign: λ1 = -")
    # a Rademacher probe gives the trace of a diagonal matrix exactly
    assert (found.trace, found.num_probes) == (pytest.approx(-5.0), 2)
    assert "stopped after 2 samples because its mean was negative" in failures(found, "trace")[0]
    assert not failures(found, "order")
    upwards = pyhessian_sharpness(Diagonal(8.0, 2.0, 1.0), output, ONES, num_eigenvalues=2)
    assert not failures(upwards, "sign") and not failures(upwards, "trace")


def test_inaccurate_trace_is_named() -> None:
    model, batch = small_mlp(), classification(10, 5)
    found = pyhessian_sharpness(model, cross_entropy, [batch], num_eigenvalues=1, density=False)
    exact = float(dense_hessian(model, cross_entropy, batch).trace())
    assert abs(found.trace - exact) < 4 * found.trace_stderr
    assert found.trace_stderr > 0.05 * found.trace
    assert f"standard error of {found.trace_stderr:.2g}" in failures(found, "trace")[0]


def test_zero_hessian_has_infinite_residuals() -> None:
    found = pyhessian_sharpness(Diagonal(0.0, 0.0), output, ONES, num_eigenvalues=1)
    assert (found.eigenvalues, found.residuals, found.trace, found.trace_stderr) == (
        (0.0,),
        (float("inf"),),
        0,
        float("inf"),
    )


# --- density


def test_missing_density_is_named_at_no_cost() -> None:
    model, batch = small_mlp(), classification(20, 5)
    found = pyhessian_sharpness(model, cross_entropy, [batch], num_eigenvalues=1)
    assert found.density is None
    (sentence,) = failures(found, "density")
    assert "torch.eig, which torch removed in 1.13" in sentence
    assert found.num_products == found.num_steps + found.num_probes
    without = pyhessian_sharpness(model, cross_entropy, [batch], num_eigenvalues=1, density=False)
    assert without.density is None and not failures(without, "density")


# --- the model, the time, the memory


def with_grad(model: nn.Module, batch: tuple[Tensor, Tensor]) -> nn.Module:
    cross_entropy(model, batch).backward()
    return model.train()


def test_model_is_untouched() -> None:
    batch = classification(12, 1, 8, 8, dtype=torch.float32)
    model = with_grad(small_cnn(), batch)
    with untouched(model):
        pyhessian_sharpness(model, cross_entropy, [batch], num_eigenvalues=2, density=False)


@pytest.mark.parametrize("part", ["eigenvalues", "trace"])
def test_error_inside_pyhessian_names_it_and_leaves_the_model_untouched(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = classification(12, 1, 8, 8, dtype=torch.float32)
    model = with_grad(small_cnn(), batch)

    def broken(self: hessian, **options: int) -> None:
        # the state of an error between the two derivatives
        proxy, _ = next(iter(self.data))
        self.criterion(self.model(proxy), proxy).backward(create_graph=True)
        raise ValueError("broken")

    monkeypatch.setattr(hessian, part, broken)
    loss = Scaled()
    grad = loss.scale.grad
    with (
        untouched(model),
        pytest.raises(RuntimeError, match=f"PyHessian 0.1 failed in its {part}: ValueError: broken") as caught,
    ):
        pyhessian_sharpness(model, loss, [batch], num_eigenvalues=1)
    assert isinstance(caught.value.__cause__, ValueError)
    assert loss.scale.grad is grad


@pytest.mark.parametrize("part", ["eigenvalues", "trace"])
def test_numbers_that_are_not_finite_are_an_error(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., tuple[list[float], object]] = hessian.eigenvalues

    def spoilt(self: hessian, **options: int) -> object:
        return ([float("nan")], original(self, **options)[1]) if part == "eigenvalues" else [1.0, float("inf")]

    monkeypatch.setattr(hessian, part, spoilt)
    with pytest.raises(RuntimeError, match=f"PyHessian 0.1 failed in its {part}: .*not all of its numbers are finite"):
        pyhessian_sharpness(Diagonal(2.0, 1.0), output, ONES, num_eigenvalues=1)


def test_progress_counts_the_products_and_time_ends_them() -> None:
    model, batch = small_mlp(), classification(20, 5)
    done: list[int] = []
    found = pyhessian_sharpness(
        model, cross_entropy, [batch], progress=Progress(show=lambda count, total, quantities: done.append(count))
    )
    assert done == list(range(1, found.num_products + 1))

    ticks: list[int] = []

    def end_after(limit: int) -> Progress:
        def on_tick() -> None:
            ticks.append(0)
            if len(ticks) == limit:
                raise TimeUp("over")

        ticks.clear()
        return Progress(on_tick=on_tick)

    pyhessian_sharpness(model, cross_entropy, [batch], progress=end_after(-1))
    total = len(ticks)
    # before PyHessian starts, in its eigenvalues, in its trace, in the residuals
    for limit in (1, 20, 2 * found.num_steps + 4, total):
        with untouched(model), pytest.raises(TimeUp, match="over"):
            pyhessian_sharpness(model, cross_entropy, [batch], progress=end_after(limit))


@contextmanager
def watched_graphs() -> Iterator[list["weakref.ref[Held]"]]:
    """Yield weak references to objects, one of which every graph built inside the block keeps alive."""
    refs: list[weakref.ref[Held]] = []

    def pack(tensor: Tensor) -> Held:
        held = Held(tensor.detach())  # torch attaches the history again; with it the graph would keep itself alive
        refs.append(weakref.ref(held))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        yield refs


class Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def gradient_penalty(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x = batch[0].clone().requires_grad_()
    loss = cross_entropy(model, (x, batch[1]))
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + gradient.square().sum()


@pytest.mark.usefixtures("without_mean_check")
@pytest.mark.parametrize("loss_fn", [cross_entropy, gradient_penalty])
def test_no_graph_outlives_the_call(loss_fn: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]) -> None:
    model, (x, y) = small_mlp(), classification(20, 5)
    alive: list[int] = []

    def counted(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        alive.append(sum(ref() is not None for ref in refs))
        return loss_fn(m, batch)

    with watched_graphs() as refs:
        pyhessian_sharpness(model, counted, [(x[:9], y[:9]), (x[9:], y[9:])], num_eigenvalues=1)
    assert len(refs) > 100 and len(alive) > 20
    assert not [ref for ref in refs if ref() is not None]
    assert max(alive) < len(refs) / len(alive) * 2  # at most about the graph of one batch at a time


# --- errors of the user


def test_without_pyhessian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyhessian", None)
    with pytest.raises(ImportError, match=r"pip install 'moe-heads\[pyhessian\]'"):
        pyhessian_sharpness(Diagonal(1.0), output, ONES)


def test_bad_losses_and_data_raise_before_pyhessian_runs() -> None:
    model, batch = small_mlp(), classification(4, 5)
    with untouched(model), pytest.raises(ValueError, match="loss_fn: expected a scalar tensor"):
        pyhessian_sharpness(model, lambda m, b: m(b[0]), [batch])
    with untouched(model), pytest.raises(ValueError, match="loss_fn: expected a finite loss"):
        pyhessian_sharpness(model, lambda m, b: cross_entropy(m, b) * float("nan"), [batch])
    with untouched(model), pytest.raises(ValueError, match="batches"):
        pyhessian_sharpness(model, cross_entropy, [])


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    model, batch = small_mlp(), classification(30, 5)
    expected = pyhessian_sharpness(model, cross_entropy, [batch], num_eigenvalues=1)
    found = pyhessian_sharpness(model.cuda(), cross_entropy, [batch], num_eigenvalues=1)
    assert found.eigenvalues == pytest.approx(expected.eigenvalues, rel=1e-6)  # the start vector is drawn on the CPU
    assert found.residuals == pytest.approx(expected.residuals, rel=1e-4)
    assert abs(found.trace - expected.trace) < 4 * (found.trace_stderr + expected.trace_stderr)

"""Properties over random sizes and inputs, by hypothesis: routing, dispatch paths, and how batches are cut."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moe_heads import Routing, SparseMoE
from moe_heads.analysis import expert_utilization, loss_landscape, random_direction, sharpness

QUICK = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
SLOW = settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Probabilities (N, E) and the distinct experts that each row chose, (N, K)."""
    num_rows, num_experts = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    k = draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 30.0]))
    logits = scale * torch.randn(num_rows, num_experts, generator=generator, dtype=torch.float64)
    indices = torch.stack([torch.randperm(num_experts, generator=generator)[:k] for _ in range(num_rows)])
    return logits.softmax(-1), indices


@QUICK
@given(routings())
def test_routing_from_probs_keeps_the_choices_and_their_weights(given_routing: tuple[Tensor, Tensor]) -> None:
    probs, indices = given_routing
    routing = Routing.from_probs(probs, indices)
    expected = torch.zeros_like(probs).scatter(1, indices, probs.gather(1, indices))
    torch.testing.assert_close(routing.gates, expected)
    assert torch.equal(routing.gates.ne(0).sum(1) <= indices.shape[1], torch.ones(len(probs), dtype=torch.bool))
    stats = routing.stats()
    torch.testing.assert_close(stats.load.sum(), torch.ones_like(stats.load.sum()))


@QUICK
@given(routings())
def test_routing_from_probs_does_not_depend_on_scale_or_order(given_routing: tuple[Tensor, Tensor]) -> None:
    probs, indices = given_routing
    one, scaled = Routing.from_probs(probs, indices), Routing.from_probs(7 * probs, indices, probs.gather(1, indices))
    torch.testing.assert_close(one.gates, scaled.gates)
    torch.testing.assert_close(one.stats().load, Routing.from_probs(probs, indices.flip(1)).stats().load)


@QUICK
@given(
    st.integers(0, 12),
    st.integers(1, 8),
    st.data(),
    st.sampled_from(["all", "gathered", "ragged", "auto"]),
    st.integers(0, 2**31),
)
def test_all_dispatch_paths_compute_the_same(
    num_rows: int, num_experts: int, data: st.DataObject, path: str, seed: int
) -> None:
    torch.manual_seed(seed)
    k = data.draw(st.integers(1, num_experts))
    width, classes = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    head = SparseMoE(3, classes, num_experts, width, k, dropout=0.0).double().eval()
    x = torch.randn(num_rows, 3, dtype=torch.float64, requires_grad=True)
    outputs = []
    for dispatch in ("all", path):
        head.dispatch = dispatch
        logits = head(x)
        (gradient,) = torch.autograd.grad(logits.square().sum(), x)
        outputs.append((logits, gradient))
    torch.testing.assert_close(*outputs)


@st.composite
def cuts(draw: st.DrawFn, total: int = 24) -> list[int]:
    """Sizes of batches that sum to a total."""
    sizes: list[int] = []
    while sum(sizes) < total:
        sizes.append(draw(st.integers(1, total - sum(sizes))))
    return sizes


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), SparseMoE(5, 3, 4, 4, 2, dropout=0.0)).double().eval()
    return model, torch.randn(24, 4, dtype=torch.float64), torch.randint(3, (24,))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@SLOW
@given(cuts())
def test_sharpness_does_not_depend_on_how_batches_are_cut(sizes: list[int]) -> None:
    model, x, y = problem()
    options = {"num_eigenvalues": 3, "tolerance": 1e-6, "density": False, "max_steps": 400}
    whole = sharpness(model, loss_fn, [(x, y)], **options)
    parts = sharpness(model, loss_fn, list(zip(x.split(sizes), y.split(sizes), strict=True)), **options)
    assert whole.eigenvalues_converged and parts.eigenvalues_converged
    torch.testing.assert_close(torch.tensor(whole.eigenvalues), torch.tensor(parts.eigenvalues), rtol=1e-5, atol=1e-9)
    assert abs(whole.center_loss - parts.center_loss) < 1e-12
    spread = 5 * (whole.trace_stderr + parts.trace_stderr)
    assert abs(whole.trace - parts.trace) <= spread + 1e-9


@SLOW
@given(cuts())
def test_landscape_and_utilization_do_not_depend_on_how_batches_are_cut(sizes: list[int]) -> None:
    model, x, y = problem()
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    direction = random_direction(model)
    whole, parts = (
        loss_landscape(model, loss_fn, given_batches, direction1=direction, num_points=5)
        for given_batches in ([(x, y)], batches)
    )
    torch.testing.assert_close(whole.losses, parts.losses)
    loads = [expert_utilization(model, given_batches).heads for given_batches in ([(x, y)], batches)]
    for one, other in zip(*(found.values() for found in loads), strict=True):
        torch.testing.assert_close(torch.as_tensor(one.load), torch.as_tensor(other.load))

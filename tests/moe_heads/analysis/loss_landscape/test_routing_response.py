import itertools
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_heads import SoftMoE
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.loss_landscape.directions import random_direction
from moe_heads.analysis.loss_landscape.function import loss_landscape
from moe_heads.analysis.loss_landscape.routing_response import RoutingResponse, has_sparse_router, routing_response
from moe_heads.analysis.sharpness.hessian import HessianOperator
from moe_heads.routers import NoisyTopKRouter
from tests.support.hand_routers import HandModel
from tests.support.head_zoo import FEATURES, ROUTERS, head_with
from tests.support.processes import run_on_ranks
from tests.support.untouched import untouched

pytestmark = pytest.mark.usefixtures("without_mean_check")

# Distances of the samples from the point where the choice flips.
XS = torch.tensor([[-3.0], [-0.5], [0.1], [0.3], [2.0]], dtype=torch.float64)


class TwoExperts(nn.Module):
    """Sends x > s to expert 0 and the others to expert 1; s is the one parameter, 0 at first.

    The gate's logits are (x, s). The output is p c or, unweighted, c + s, with c = 1 for expert 0 and 3 for expert 1.
    """

    shift: nn.Parameter

    def __init__(self, weighted: bool) -> None:
        super().__init__()
        self.weighted = weighted
        self.router = NoisyTopKRouter(1, 2, k=1, noisy=False).double().requires_grad_(False)
        self.router.gate.weight.copy_(torch.tensor([[1.0], [0.0]]))
        self.router.gate.bias = None
        self.router.gate.register_forward_hook(lambda gate, args, z: z + self.shift * torch.tensor([0.0, 1.0]))
        self.shift = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.values = torch.tensor([1.0, 3.0], dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        routing = self.router(x)
        if self.weighted:
            return (routing.gates * self.values).sum(-1)
        return (routing.selected * self.values).sum(-1) + self.shift


def mean(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).mean()


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def sparse_problem(name: str = "noisy_top_k") -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), head_with(name)).double()
    return model, (torch.randn(15, FEATURES, dtype=torch.float64), torch.randint(3, (15,)))


def weighted_loss(step: float, choices: Tensor) -> float:
    """Mean of the chosen expert's probability times its value, by hand."""
    x = XS.squeeze(1)
    return float(torch.where(choices, torch.sigmoid(x - step), 3 * torch.sigmoid(step - x)).mean())


STEPS = [0.2, -1.0, 0.05, 1.0, -0.2, 5.0, -0.05]


def test_flips_and_losses_by_hand() -> None:
    response = routing_response(TwoExperts(weighted=True), mean, [XS[:2], XS[2:]], torch.ones(1), STEPS)
    assert response.steps == tuple(STEPS)
    assert response.flips == (0.2, 0.2, 0, 0.4, 0, 0.6, 0)
    at_center = XS.squeeze(1) > 0
    assert response.center_loss == pytest.approx(weighted_loss(0, at_center), rel=1e-14)
    for step, free, fixed in zip(STEPS, response.losses_free, response.losses_fixed, strict=True):
        assert free == pytest.approx(weighted_loss(step, XS.squeeze(1) > step), rel=1e-14)
        assert fixed == pytest.approx(weighted_loss(step, at_center), rel=1e-14)
    assert response.num_samples == 5


def test_the_fixed_loss_is_a_parabola_and_the_free_one_jumps() -> None:
    """Mean of (c + s)²: its second difference is 2 at any step; a sample that goes to the other expert adds a jump."""
    response = routing_response(TwoExperts(weighted=False), mean_square, [XS], torch.ones(1), STEPS)
    for step in (0.05, 0.2, 1.0):
        assert response.curvature_fixed(step) == pytest.approx(2, rel=1e-9)
    assert response.curvature_free(0.05) == pytest.approx(2, rel=1e-9)
    # at s = 0.2 one of five samples has gone from 1.2² to 3.2²
    assert response.curvature_free(0.2) == pytest.approx(2 + (3.2**2 - 1.2**2) / 5 / 0.04, rel=1e-9)
    assert response.curvature_free(-0.2) == response.curvature_free(0.2)
    assert response.curvature_free(5.0) is response.curvature_fixed(5.0) is response.curvature_free(0) is None


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "softmax"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_curvature_at_fixed_routing_is_that_of_the_hessian(name: str, tokens: int) -> None:
    """At steps at which choices flip, which the free loss does not forgive."""
    head = head_with(name)
    # two experts tie almost, for every row
    head.router.gate.weight.data.mul_(1e-5)
    head.router.gate.bias.data.zero_()
    x = torch.randn(12, tokens, FEATURES, dtype=torch.float64).squeeze(1)
    batch = x, torch.randint(3, (12,))
    direction = random_direction(head)
    direction /= direction.norm()
    response = routing_response(head, cross_entropy, [batch], direction, [-1e-3, 1e-3])
    assert min(response.flips) > 0.3
    expected = direction @ HessianOperator(head, cross_entropy, [batch]).matvec(direction)
    assert response.curvature_fixed(1e-3) == pytest.approx(expected.item(), rel=1e-3)
    assert response.curvature_free(1e-3) != pytest.approx(expected.item(), rel=1.0)


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "softmax"])
def test_equals_the_landscape_bit_for_bit(name: str) -> None:
    model, (x, y) = sparse_problem(name)
    batches = list(zip(x.split([4, 11]), y.split([4, 11]), strict=True))
    direction = random_direction(model)
    line = loss_landscape(model, cross_entropy, batches, direction1=direction, num_points=7)
    response = routing_response(model, cross_entropy, batches, direction, line.alphas)
    assert response.losses_free == tuple(line.losses.tolist())
    assert response.losses_fixed == tuple(line.losses_fixed_routing.tolist())
    assert response.flips == tuple(line.routing_flips.tolist())
    assert response.center_loss == line.center_loss == response.losses_fixed[3]
    assert response.losses_fixed[0] != response.losses_free[0]


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "expert_choice"])
def test_uneven_batches_equal_one_batch(name: str) -> None:
    model, (x, y) = sparse_problem(name)
    direction = random_direction(model)
    whole = routing_response(model, cross_entropy, [(x, y)], direction, STEPS)
    parts = zip(x.split([1, 3, 11]), y.split([1, 3, 11]), strict=True)
    split = routing_response(model, cross_entropy, parts, direction, STEPS)
    assert split.metrics() == pytest.approx(whole.metrics(), rel=1e-7)
    assert split.num_samples == 15


def test_several_heads_and_passes_and_tokens() -> None:
    """Soft routers have no part in the flips, though their largest gate moves."""

    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = head_with("switch"), head_with("softmax")

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x) + self.first(x.flip(1))

    model = Several()
    x = torch.randn(20, 3, FEATURES, dtype=torch.float64)
    direction = random_direction(model)
    response = routing_response(model, mean_square, [x[:7], x[7:]], direction, [-1.0, 1e-12, 0.3])
    assert response.flips[0] > 0.5 > response.flips[1] == 0
    assert response.losses_fixed[2] != response.losses_free[2]
    only_soft = torch.cat([
        (direction if name.startswith("second") else 0 * direction)[: parameter.numel()]
        for name, parameter in model.named_parameters()
    ])
    response = routing_response(model, mean_square, [x], 9 * only_soft, [-1.0, 1.0])
    assert response.flips == (0, 0)
    assert response.losses_fixed == response.losses_free != (response.center_loss,) * 2


@pytest.mark.parametrize("model", [nn.Linear(FEATURES, 3), SoftMoE(FEATURES, 3), head_with("softmax", torch.float32)])
def test_without_a_sparse_router(model: nn.Module) -> None:
    assert not has_sparse_router(model)
    response = routing_response(model, mean_square, [torch.randn(4, FEATURES)], random_direction(model), [-1.0, 1.0])
    assert response.flips is response.losses_fixed is response.curvature_fixed(1.0) is None
    assert response.curvature_free(1.0) > 0
    assert set(response.metrics()) == {
        "center_loss",
        "loss_free_-1",
        "loss_free_1",
        "curvature_free_1",
        "num_samples",
    }
    assert "No sparse router ran" in response.summary()
    assert "flip" not in response.summary()


def test_has_sparse_router_at_any_depth() -> None:
    for name in set(ROUTERS) - {"softmax"}:
        assert has_sparse_router(nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"head": head_with(name)})))


def test_metrics_and_summary() -> None:
    response = routing_response(TwoExperts(weighted=False), mean_square, [XS], torch.ones(1), [-0.2, 0.2, 0.0])
    metrics = response.metrics()
    assert metrics["flips_0.2"] == 0.2
    assert metrics["loss_fixed_-0.2"] == pytest.approx((2 * 2.8**2 + 3 * 0.8**2) / 5)
    assert metrics["loss_free_0"] == metrics["loss_fixed_0"] == metrics["center_loss"] == pytest.approx(21 / 5)
    assert metrics["curvature_free_0.2"] == pytest.approx(46)
    assert metrics["curvature_fixed_0.2"] == pytest.approx(2)
    assert "partial" not in metrics
    assert response.summary().splitlines() == [
        "| step s | loss | rise | loss, routing of s = 0 | rise, routing of s = 0 | samples that flip |",
        "| --- | --- | --- | --- | --- | --- |",
        "| -0.2 | 3.52 | -0.68 | 3.52 | -0.68 | 0.00% |",
        "| 0 | 4.2 | +0 | 4.2 | +0 | 0.00% |",
        "| 0.2 | 6.72 | +2.52 | 4.96 | +0.76 | 20.00% |",
        "",
        "| step s | (L(s) + L(-s) - 2 L(0)) / s² | at the routing of s = 0 |",
        "| --- | --- | --- |",
        "| 0.2 | 46 | 2 |",
        "",
        "5 samples. The loss at s = 0 is 4.2.",
        "",
        "The loss jumps where samples flip. The Hessian is that of the loss at fixed routing.",
    ]


def test_both_ends_of_a_grid_with_rounding_errors_belong_together() -> None:
    response = routing_response(nn.Linear(1, 1).double(), mean_square, [XS], torch.ones(2), [-0.3, 0.1 + 0.2])
    assert 0.3 != 0.1 + 0.2
    assert response.curvature_free(0.3) == pytest.approx(response.curvature_free(0.1 + 0.2))


def test_losses_that_are_not_finite_stay_so() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    response = routing_response(
        model, lambda m, b: m(b).log().mean(), [torch.ones(2, 1)], torch.ones(1), [-2.0, -1.0, 1.0]
    )
    assert math.isnan(response.losses_free[0])
    assert response.losses_free[1:] == (-math.inf, pytest.approx(math.log(2)))
    assert response.curvature_free(1.0) == -math.inf
    assert set(response.metrics()) == {"center_loss", "loss_free_1", "num_samples"}
    assert "Some losses are nan or inf." in response.summary()


def test_a_step_to_logits_that_are_not_finite_is_kept() -> None:
    model, batch = sparse_problem()
    response = routing_response(
        model, cross_entropy, [batch], torch.full_like(random_direction(model), 1e308), [1.0, 10.0]
    )
    assert not any(math.isfinite(loss) for loss in (response.losses_free[1], response.losses_fixed[1]))
    assert response.flips[1] == 1


def test_a_loss_that_takes_a_gradient_itself() -> None:
    """The penalty (d loss / d s)² = 4 mean(c + s)² of the parabola."""

    def penalty(m: nn.Module, batch: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(m(batch).square().mean(), [m.shift], create_graph=True)
        return slope.square().sum()

    model = TwoExperts(weighted=False)
    with untouched(model):
        response = routing_response(model, penalty, [XS], torch.ones(1), [0.2])
    assert response.losses_fixed == (pytest.approx(4 * (9 / 5 + 0.2) ** 2),)
    assert response.losses_free == (pytest.approx(4 * (11 / 5 + 0.2) ** 2),)


def test_no_graph_of_a_batch_that_is_over_is_kept() -> None:
    class Held:
        """A tensor that a graph needs."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()  # with its graph it would hold itself
            held.add(self)

    held: weakref.WeakSet[Held] = weakref.WeakSet()
    counts: list[int] = []

    def penalty(m: nn.Module, batch: Tensor) -> Tensor:
        assert not held
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda packed: packed.tensor):
            loss = m(batch).square().mean()
        counts.append(len(held))
        return torch.autograd.grad(loss, [m.shift], retain_graph=True)[0].square().sum()

    routing_response(TwoExperts(weighted=True), penalty, [XS[:2], XS[2:]], torch.ones(1), [0.2, 0.3])
    assert sorted(counts)[:2] == [0, 7]  # one attempt without a graph


def test_everything_is_put_back_also_after_an_interruption() -> None:
    model, batch = sparse_problem()
    model[0].bias.requires_grad_(False)
    cross_entropy(model, batch).backward()
    direction = random_direction(model)
    model.train()
    with untouched(model):
        routing_response(model, cross_entropy, [batch], direction, STEPS)
    calls: list[float] = []

    def interrupted(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(m[0].weight.sum().item())
        if len(calls) == 6:  # the second step, with its routing fixed
            m(b[0])
            raise KeyboardInterrupt
        return cross_entropy(m, b)

    with untouched(model), pytest.raises(KeyboardInterrupt):
        routing_response(model, interrupted, [batch], direction, STEPS)
    assert len(set(calls)) == 3  # the parameters had moved


@pytest.mark.parametrize("call", [1, 2, 3, 5])
def test_a_batch_that_does_not_fit_is_halved(call: int) -> None:
    """Calls 1 to 3: the center, the first step free, and fixed."""
    model, (x, y) = sparse_problem()
    direction = random_direction(model)
    expected = routing_response(model, cross_entropy, [(x, y)], direction, STEPS)
    count = itertools.count(1)

    def hungry(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if next(count) >= call and len(batch[0]) > 4:
            raise MemoryError
        return cross_entropy(m, batch)

    response = routing_response(model, hungry, [(x, y)], direction, STEPS)
    assert response.metrics() == pytest.approx(expected.metrics(), rel=1e-7)


def test_progress_counts_the_center_and_the_steps() -> None:
    model, batch = sparse_problem()
    shown: list[tuple[int, int | None]] = []
    progress = Progress(show=lambda done, total, found: shown.append((done, total)))
    routing_response(model, cross_entropy, [batch], random_direction(model), [0.5, 0.0, -0.5], progress=progress)
    assert shown == [(1, 3), (2, 3), (3, 3)]


def timed(last: int) -> Progress:
    """A progress whose time is over after so many steps."""

    def show(done: int, total: int | None, found: object) -> None:
        progress._deadline = -math.inf if done == last else progress._deadline

    progress = Progress(show=show)
    return progress


def test_the_steps_near_the_center_are_there_when_the_time_is_over() -> None:
    model, batch = sparse_problem()
    direction = random_direction(model)
    whole = routing_response(model, cross_entropy, [batch], direction, STEPS)
    partial = routing_response(model, cross_entropy, [batch], direction, STEPS, progress=timed(4))
    assert partial.steps == (0.2, 0.05, -0.05)
    assert partial.losses_fixed == tuple(whole.losses_fixed[STEPS.index(step)] for step in partial.steps)
    assert partial.num_unmeasured == 4
    assert partial.metrics()["partial"] == 1
    assert partial.curvature_free(0.2) is None
    assert "**Partial**: max_time = None s was over. 4 steps are missing." in partial.summary()
    with untouched(model), pytest.raises(TimeUp):
        routing_response(model, cross_entropy, [batch], direction, STEPS, progress=timed(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": torch.ones(3)}, r"direction: expected shape \(2,\)"),
        ({"direction": torch.tensor([1.0, math.nan])}, "direction: expected finite entries"),
        ({"steps": []}, r"steps: expected at least one number, finite and distinct, got \[\]"),
        ({"steps": [0.1, math.inf]}, r"steps: .* got \[0.1, inf\]"),
        ({"steps": [0.1, 0.1]}, r"steps: .* got \[0.1, 0.1\]"),
        ({"steps": 0.1}, "steps: .* got 0.1"),
        ({"batches": []}, "batches: expected at least one batch"),
        ({"loss_fn": lambda m, b: m(b)}, r"loss_fn: expected a scalar tensor, .* batch 0, got shape \(4, 1\)"),
        ({"loss_fn": lambda m, b: 1.0}, "loss_fn: expected a scalar tensor, .* batch 0, got float"),
        (
            {"loss_fn": lambda m, b: m(b).sum() * (b.sum() - 8).log()},
            "loss_fn: expected a finite loss of the given model, got nan as the loss of batch 0",
        ),
        (
            {"loss_fn": lambda m, b: m(b).mean() / (b.sum() - 8)},
            "loss_fn: expected a finite loss of the given model, got -?inf as the loss of batch 1",
        ),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    model = nn.Linear(1, 1)
    batches = [torch.ones(4, 1), torch.full((4, 1), 2.0)]
    arguments = {"loss_fn": mean_square, "batches": batches, "direction": torch.ones(2), "steps": [0.1]}
    with untouched(model), pytest.raises(ValueError, match=message):
        routing_response(model, **(arguments | options))


def test_routers_that_see_other_rows_than_at_the_center() -> None:
    model, (x, _) = sparse_problem()
    start = model[0].weight.detach().clone()

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        return m(batch if torch.equal(m[0].weight, start) else batch[:2]).mean()

    with pytest.raises(ValueError, match=r"expected the same routed rows at every point .* got shapes \[\(2, 4\)\]"):
        routing_response(model, loss, [x], random_direction(model), [0.1])


def test_a_router_of_ones_own_without_rechosen_is_refused() -> None:
    with pytest.raises(ValueError, match="model: expected sparse routers that define rechosen"):
        routing_response(HandModel(2, k=1), mean_square, [torch.randn(3, 2)], torch.ones(2), [0.1])


def caught(run: Callable[[], RoutingResponse]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def on_rank(rank: int) -> dict[str, Any]:
    ranks = Ranks(dist.group.WORLD, "test")
    model, (x, y) = sparse_problem()
    direction = random_direction(model)
    mine = [(x[:1], y[:1]), (x[1:4], y[1:4])] if rank == 0 else [(x[4:6], y[4:6]), (x[6:], y[6:])]
    dense = nn.Linear(FEATURES, 3).double()

    def fails(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(m, b) / (rank == 0 or 0.0)

    # the clock of rank zero, which ends the analysis in the middle of a step
    progress, count = Progress(), itertools.count(1)

    def slow(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        # three calls compare the batch with its halves
        if rank == 0 and next(count) == 3 + 9:
            progress._deadline = -math.inf
        return cross_entropy(m, b)

    return {
        "whole": routing_response(model, cross_entropy, mine, direction, STEPS, ranks=ranks),
        "partial": routing_response(model, slow, mine, direction, STEPS, ranks=ranks, progress=progress),
        "dense": routing_response(dense, cross_entropy, mine, random_direction(dense), [1.0], ranks=ranks),
        "error": caught(lambda: routing_response(model, fails, mine, direction, STEPS, ranks=ranks)),
    }


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    model, batch = sparse_problem()
    alone = routing_response(model, cross_entropy, [batch], random_direction(model), STEPS)
    zero, one = run_on_ranks(on_rank, tmp_path)
    assert zero["whole"] == one["whole"]
    assert zero["whole"].metrics() == pytest.approx(alone.metrics(), rel=1e-7)
    assert max(alone.flips) > 0
    assert zero["partial"] == one["partial"]
    assert zero["partial"].steps == (0.05, -0.05)
    assert zero["dense"].flips is one["dense"].losses_fixed is None
    assert one["error"].startswith("ValueError: loss_fn: expected a finite loss of the given model, got inf")
    assert zero["error"].startswith("RankError: rank 1: ValueError: loss_fn: expected a finite loss")

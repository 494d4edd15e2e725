"""The metric, its recorder, routing flips, and warnings about unhealthy routers."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_heads import Routing, RoutingStats, SoftMoE, SparseMoE, collect_routing
from moe_heads.analysis import ExpertUtilizationMetric
from moe_heads.analysis.expert_utilization import recorder as recorder_module
from moe_heads.analysis.expert_utilization.advice import advice_for
from moe_heads.analysis.expert_utilization.flips import EpochChoices
from moe_heads.analysis.expert_utilization.health import RouterHealth
from moe_heads.analysis.expert_utilization.metric import utilization_scalars
from moe_heads.analysis.expert_utilization.recorder import UtilizationRecorder
from moe_heads.routers import BiasBalancedRouter, ExpertChoiceRouter, NoisyTopKRouter, SwitchRouter
from tests.support.head_zoo import FEATURES, ROUTERS, head_with
from tests.support.processes import NUM_RANKS, run_on_ranks


def routings(num_batches: int = 5) -> Iterator[Routing]:
    torch.manual_seed(0)
    head = SparseMoE(6, 3, num_experts=4, expert_width=2, noisy=True)
    for size in range(3, 3 + num_batches):
        yield head(torch.randn(size, 6), return_routing=True).routing


def total(those: list[Routing]) -> RoutingStats:
    stats = those[0].stats()
    for routing in those[1:]:
        stats = stats + routing.stats()
    return stats


def test_sums_and_shares() -> None:
    metric, all_of_them = ExpertUtilizationMetric(4), list(routings())
    for routing in all_of_them:
        metric.update(routing)
    expected = total(all_of_them)
    assert torch.equal(metric.stats.counts, expected.counts)
    found = metric.compute()
    for expert in range(4):
        assert found[f"load_{expert}"] == expected.load[expert]
    relative = 4 * expected.load
    assert found["max_violation"] == pytest.approx(float(relative.max()) - 1)
    assert found["load_cv"] == pytest.approx(float(relative.std(correction=0)))
    assert found["relative_load_p50"] == pytest.approx(float(relative.median()), abs=0.5)
    counts = [
        int((r.logits.topk(2).indices.sort(-1).values == r.indices.sort(-1).values).all(-1).sum()) for r in all_of_them
    ]
    agreeing = sum(counts)
    assert found["noise_agreement"] == pytest.approx(agreeing / int(expected.num_rows))
    assert 0 < agreeing < int(expected.num_rows)


def test_many_experts_have_percentiles_and_no_curves_each() -> None:
    probs = torch.rand(10, 20).softmax(-1)
    metric = ExpertUtilizationMetric(20)
    metric.update(Routing.from_probs(probs, probs.topk(1).indices))
    assert not any(name.startswith(("load_1", "importance_")) for name in metric.compute())
    assert "relative_load_p90" in metric.compute()
    assert "noise_agreement" not in metric.compute()


def test_a_router_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="routing: expected 3 experts, got 4"):
        ExpertUtilizationMetric(3).update(next(routings()))
    with pytest.raises(ValueError, match="num_experts: expected an integer of at least 1, got 0"):
        ExpertUtilizationMetric(0)


def on_rank(rank: int) -> dict[str, torch.Tensor]:
    metric = ExpertUtilizationMetric(4)
    for number, routing in enumerate(routings()):
        if (number == 0) == (rank == 0):  # uneven: one batch on one, four on the other
            metric.update(routing)
    assert dist.is_initialized()
    return metric.compute()


def test_two_ranks_are_one(tmp_path: Path) -> None:
    alone = ExpertUtilizationMetric(4)
    for routing in routings():
        alone.update(routing)
    expected = alone.compute()
    for found in run_on_ranks(on_rank, tmp_path):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            is_count = name.startswith(("load", "relative", "noise", "max"))
            assert found[name] == (value if is_count else pytest.approx(float(value))), name
    assert NUM_RANKS == 2


@pytest.mark.parametrize("router", list(ROUTERS))
@pytest.mark.parametrize("max_pending", [1, 100, 2**20])
def test_what_waits_counts_like_what_is_counted_at_once(
    router: str, max_pending: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "_MAX_PENDING", max_pending)
    model = nn.Sequential(head_with(router, torch.float32))
    recorder, seen = UtilizationRecorder(), []
    with collect_routing(model) as collection:
        for size in (7, 3, 7):
            model(torch.randn(size, FEATURES))
            seen += collection.routings["0"]
            recorder.record(collection)
            assert collection.routings["0"] == []
    recorder.count()
    kind = recorder.kinds["0"]
    expected, found = total(seen), recorder.metric("0", kind).stats
    assert kind.soft == (router == "softmax")
    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.num_rows, expected.num_rows)
    for name in ("gate_sum", "prob_sum", "entropy_sum", "margin_sum"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    recorder.reset()
    assert recorder.metric("0", kind).stats.num_rows == 0


def test_what_waits_holds_no_graph() -> None:
    model, recorder = nn.Sequential(nn.Linear(3, 4), SoftMoE(4, 2, num_experts=3)), UtilizationRecorder()
    with collect_routing(model) as collection:
        model(torch.randn(4, 3))
    recorder.record(collection)
    ((_, values),) = recorder._pending["1"]
    assert len(kept := [value for value in values if value is not None]) == 2  # not what the slots were made of
    assert not any(value.requires_grad for value in kept)


def sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.1)


def test_gradient_norms_are_those_of_every_twentieth_optimizer_step() -> None:
    recorder, router = UtilizationRecorder(), nn.Linear(3, 2)
    optimizer = sgd(router)
    recorder.record_gradients({"head": router}, optimizer)
    assert recorder.gradient_norms() == {}
    recorder.reset()
    for number in range(40):
        for parameter in router.parameters():
            parameter.grad = torch.full_like(parameter, number)
        recorder.record_gradients({"head": router}, optimizer)
    assert recorder.gradient_norms() == {"head": (pytest.approx(20 * 8**0.5), 2)}


def test_gradients_that_another_optimizer_leaves_alone_are_not_noted() -> None:
    recorder, router, other = UtilizationRecorder(), nn.Linear(3, 2), nn.Linear(2, 2)
    of_router, of_other = sgd(router), sgd(other)
    for number in range(20):
        for parameter in router.parameters():
            parameter.grad = torch.full_like(parameter, 100.0 if number % 2 == 0 else 1.0)
        recorder.record_gradients({"head": router}, of_other if number % 2 == 0 else of_router)
    assert recorder.gradient_norms() == {"head": (pytest.approx(8**0.5), 1)}


def hard(experts: list[int]) -> list[Routing]:
    probs = nn.functional.one_hot(torch.tensor(experts), 3).float().softmax(-1)
    return [Routing.from_probs(probs, probs.topk(1).indices)]


def epoch(choices: EpochChoices, experts: list[int], batch: Any) -> tuple[int, int]:
    choices.add(hard(experts), batch)
    return choices.end_epoch()


@pytest.mark.parametrize("batch", [(torch.randn(4, 700), torch.tensor([0, 1, 1, 0])), {"x": torch.ones(4, 1)}, "text"])
def test_flips_between_epochs(batch: Any) -> None:
    choices = EpochChoices()
    assert epoch(choices, [0, 1, 2, 0], batch) == (0, 0)
    assert epoch(choices, [0, 2, 2, 1], batch) == (2, 4)
    assert epoch(choices, [0, 2, 2, 1], batch) == (0, 4)


def test_data_with_nan_are_known_again() -> None:
    choices, batch = EpochChoices(), torch.full((2, 3), torch.nan)
    epoch(choices, [0, 1], batch)
    assert epoch(choices, [0, 2], batch) == (1, 2)


X, ONE_HOT = torch.randn(4, 700), torch.eye(4)


@pytest.mark.parametrize(
    ("experts", "batch"),
    [
        ([0, 1, 2, 0], (X.flip(0), ONE_HOT)),
        ([0, 1, 2, 0], (X, ONE_HOT.flip(0))),
        ([0, 1], (X[:2], ONE_HOT[:2])),
        ([0, 1, 2, 0], X),
    ],
)
def test_other_data_are_not_compared(experts: list[int], batch: Any) -> None:
    choices = EpochChoices()
    epoch(choices, [0, 1, 2, 0], (X, ONE_HOT))
    assert epoch(choices, experts, batch) == (0, 0)
    assert choices.data_changed
    assert epoch(choices, experts, batch) == (0, len(experts))
    assert not choices.data_changed


def stats_of(shares: list[float]) -> RoutingStats:
    load = torch.tensor(shares, dtype=torch.float64)
    zero, rows = torch.tensor(0.0), torch.tensor(1000)
    counts = (1000 * load).long()
    return RoutingStats(counts, load, load, zero, zero, torch.tensor(0), rows, torch.tensor(0))


ROUTER = SparseMoE(8, 3, num_experts=4, expert_width=2, noisy=True).router


def health(soft: bool = False, dead_below: float = 0.01) -> RouterHealth:
    return RouterHealth(soft, advice_for(ROUTER, soft), dead_below=dead_below, starved_below=0.25)


def test_health_tells_each_thing_once_and_what_to_change() -> None:
    router = health()
    assert list(router.new_warnings(stats_of([0.25] * 4))) == []
    (starving,) = router.new_warnings(stats_of([0.35, 0.3, 0.3, 0.05]))
    assert starving.startswith("1 of 4 experts starved: number 3 (20.0% of the fair share of the load).")
    assert "num_shared_experts=2, noisy=False, normalize=True and balance={'switch': 0.1}" in starving
    (dead,) = router.new_warnings(stats_of([0.35, 0.3, 0.35, 0.0]))
    assert dead.startswith("1 of 4 experts dead: number 3 (0.0%")
    assert list(router.new_warnings(stats_of([0.35, 0.3, 0.35, 0.0]))) == []
    # one sentence for an epoch, and the advice once
    (warned,) = router.new_warnings(stats_of([0.98, 0.01, 0.01, 0.0]))
    assert warned.startswith("the routing collapses to 1.1 effective experts of 4; 2 of 4 experts starved: numbers 1 (")
    assert "numbers 1 (4.0% of the fair share of the load), 2 (4.0%). Build the SparseMoE with" in warned
    assert warned.count("Build the SparseMoE with") == 1


def test_an_expert_that_recovers_is_no_news_and_one_that_dies_again_is() -> None:
    router, sick, well = health(), stats_of([0.5, 0.5, 0.0]), stats_of([0.4, 0.3, 0.3])
    (dead,) = router.new_warnings(sick)
    assert "1 of 3 experts dead: number 2" in dead
    assert list(router.new_warnings(stats_of([0.5, 0.48, 0.02]))) == []  # it starves on
    assert list(router.new_warnings(well)) == []
    assert list(router.new_warnings(sick)) == [dead]


def test_two_experts_can_collapse_and_without_a_limit_the_dead_do_not_starve() -> None:
    (warned,) = health(dead_below=0.0).new_warnings(stats_of([1.0, 0.0]))
    assert "1.0 effective experts of 2; 1 of 2 experts dead: number 1 (0.0%" in warned
    assert "starved" not in warned


def test_what_only_evaluation_shows_twice_is_told_once_and_apart() -> None:
    router, even, sick = health(), stats_of([0.25] * 4), stats_of([0.35, 0.3, 0.35, 0.0])
    assert list(router.new_warnings(even, even)) == []
    assert (
        list(router.new_warnings(even, sick)) == []
    )  # it may have died at the end of the epoch: the next one shows it
    (dead,) = router.new_warnings(even, sick)
    assert dead.startswith("on the validation data, but not in training, 1 of 4 experts dead: number 3 (0.0%")
    assert "noisy=False" in dead and "noisy=True" not in dead
    assert list(router.new_warnings(even, sick)) == []
    # what training shows as well is warned of training alone
    router = health()
    (dead,) = [*router.new_warnings(even, sick), *router.new_warnings(sick, sick), *router.new_warnings(sick, sick)]
    assert dead.startswith("1 of 4 experts dead: number 3 (0.0%")
    # an expert that starves in training and is dead in evaluation
    router, starving = health(), stats_of([0.35, 0.3, 0.31, 0.04])
    warned = [line for _ in range(2) for line in router.new_warnings(starving, sick)]
    assert [line[:45] for line in warned] == [
        "1 of 4 experts starved: number 3 (16.0% of th",
        "on the validation data, but not in training, ",
    ]
    # nothing shows "not in training" of an epoch too short to tell
    few = RoutingStats(**{**vars(even), "counts": torch.tensor([9] * 4)})
    assert [line for _ in range(3) for line in health().new_warnings(few, sick)] == []


def test_an_even_router_that_made_few_choices_has_not_collapsed() -> None:
    """20 choices are in effect 20 experts at most."""
    share = [1 / 20] * 20 + [0.0] * 44
    few = RoutingStats(**{**vars(stats_of(share)), "counts": torch.tensor([1] * 20 + [0] * 44)})
    assert list(health().new_warnings(few)) == []


def test_many_experts_collapse_though_each_has_few_choices() -> None:
    """600 choices of 64 experts, all of the same one; which experts are dead needs more."""
    one = RoutingStats(**{**vars(stats_of([1.0] + [0.0] * 63)), "counts": torch.tensor([600] + [0] * 63)})
    (warned,) = health().new_warnings(one)
    assert warned.startswith("the routing collapses to 1.0 effective experts of 64. ")
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        counts = torch.bincount(torch.randint(50, (100,), generator=generator), minlength=50)
        even = RoutingStats(**{**vars(stats_of((counts / 100).tolist())), "counts": counts})
        assert list(health().new_warnings(even)) == []
    # in validation alone: experts of which training said too little are not warned
    even = RoutingStats(**{**vars(stats_of([1 / 64] * 64)), "counts": torch.tensor([9] * 64)})
    router = health()
    warned = [line for _ in range(3) for line in router.new_warnings(even, stats_of([1.0] + [0.0] * 63))]
    assert [line.count("dead") for line in warned] == [0]


def test_many_experts_are_not_all_named() -> None:
    (warned,) = health().new_warnings(stats_of([0.125] * 8 + [0.0] * 12))
    assert "12 of 20 experts dead: numbers 8 (0.0% of the fair share of the load)," in warned
    assert ", 15 (0.0%) and 4 more" in warned


def test_rows_without_finite_logits_are_told_while_they_last() -> None:
    router, broken = health(), RoutingStats(**{**vars(stats_of([0.25] * 4)), "num_nonfinite": torch.tensor(500)})
    (warned,) = router.new_warnings(broken)
    assert warned.startswith("500 of 1500 rows had router logits that are nan or infinite")
    assert list(router.new_warnings(broken)) == []
    assert list(router.new_warnings(stats_of([0.25] * 4))) == []
    assert len(list(router.new_warnings(broken))) == 1


def test_health_counts() -> None:
    assert health().counts(stats_of([0.5, 0.45, 0.05, 0.0])) == {"num_dead_experts": 1, "num_starved_experts": 1}


class Gate(nn.Linear):
    """A user's router."""


@pytest.mark.parametrize(
    ("router", "soft", "advised", "not_advised"),
    [
        (ROUTER, False, "The noise may", "router=..."),
        (NoisyTopKRouter(8, 4, 2, noisy=False), False, "num_shared_experts=2", "The noise may"),
        (SwitchRouter(8, 4), False, "jitter", "The noise may"),
        (SwitchRouter(8, 4, jitter=0.0), False, "the router with normalize=True", "jitter"),
        (ExpertChoiceRouter(8, 4), False, "by construction", "noisy"),
        (SparseMoE(8, 3, num_experts=4, k=1).router, False, "fewer experts or k = 2", "the defaults"),
        (SwitchRouter(8, 4, normalize=True, balance={"switch": 0.1}), False, "fewer experts", "with normalize=True"),
        (SoftMoE(8, 3, num_experts=4).router, True, "balance={'kl': ...}", "noisy"),
        (BiasBalancedRouter(8, 4), False, "update_rate", "balance="),
        (Gate(8, 4), False, "shared experts", "balance="),
        (Gate(8, 4), True, "mean weights", "balance="),
    ],
)
def test_only_what_the_router_has_is_advised(router: nn.Module, soft: bool, advised: str, not_advised: str) -> None:
    advice = advice_for(router, soft)
    assert advised in advice.in_training + advice.in_evaluation
    assert not_advised not in advice.in_training + advice.in_evaluation


def test_a_few_choices_tell_nothing() -> None:
    """An even router of 40 experts leaves 12 of them without any of 48 choices, by chance."""
    few = torch.randint(40, (48,), generator=torch.Generator().manual_seed(0)).bincount(minlength=40)
    assert int((few == 0).sum()) > 5
    stats = stats_of([1 / 40] * 40)
    assert list(health().new_warnings(RoutingStats(**{**vars(stats), "counts": few}))) == []
    many = torch.tensor([*[10] * 38, 20, 0])
    (dead,) = health().new_warnings(RoutingStats(**{**vars(stats), "counts": many}))
    assert "1 of 40 experts dead: number 39 (0.0%" in dead


def test_a_soft_router_is_told_by_its_weights() -> None:
    stats = RoutingStats(**{**vars(stats_of([0.25] * 4)), "counts": torch.tensor([1000, 0, 0, 0])})
    assert list(health(soft=True).new_warnings(stats)) == []
    (dead, *_) = health(soft=True).new_warnings(stats_of([0.4, 0.3, 0.3, 0.0]))
    assert "mixing weight" in dead
    assert "balance={'kl': ...}" in dead


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_without_a_row_there_is_no_number() -> None:
    found = ExpertUtilizationMetric(4).compute()
    assert found and all(value.isnan() for value in found.values())


def test_unknown_entropy_and_margin_are_absent() -> None:
    """Of a router that is known by its choices and weights alone."""
    known = next(routings()).stats()
    nan = torch.tensor(torch.nan, dtype=torch.float64)
    stats = dataclasses.replace(known, entropy_sum=nan, margin_sum=nan, prob_sum=known.prob_sum * nan)
    found = utilization_scalars(stats)
    assert found == {name: v for name, v in utilization_scalars(known).items() if name not in ("entropy", "margin")}

"""The summary over layers."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_heads.analysis.expert_utilization.layers import Layer, summarize_layers, training_numbers, worst_first
from moe_heads.analysis.expert_utilization.metric import utilization_scalars
from tests.support.utilizations import head_of, heads_of, stats_of


def layers(*loads: list[float]) -> dict[str, Layer]:
    return {f"layers.{number}": Layer.of_head(head_of(load)) for number, load in enumerate(loads)}


def of_counts(counts: list[int], **changed: float) -> Layer:
    stats = stats_of(counts)
    return Layer.of_stats(stats, False, 0.01, 0.25, {**utilization_scalars(stats), **changed})


def test_levels_of_three_layers_by_hand() -> None:
    found = summarize_layers(layers([1, 1, 1, 1], [2, 2, 0, 0], [4, 0, 0, 0]))
    assert [found[f"load_cv/{level}"] for level in ("worst", "median", "best")] == pytest.approx([3**0.5, 1, 0])
    assert [found[f"max_violation/{level}"] for level in ("worst", "median", "best")] == pytest.approx([3, 1, 0])
    effective = [found[f"relative_effective_experts/{level}"] for level in ("worst", "median", "best")]
    assert effective == pytest.approx([0.25, 0.5, 1.0])
    assert found["relative_entropy/median"] == pytest.approx(0.5 / math.log(4))
    assert (found["num_dead_experts"], found["num_layers_with_dead_experts"]) == (5, 2)
    assert found["num_starved_experts"] == 0
    assert "margin" not in str(found)


@given(st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=6).filter(any), min_size=1, max_size=7))
@settings(max_examples=50, deadline=None)
def test_levels_are_those_of_a_loop_over_the_experts(counts: list[list[int]]) -> None:
    found = summarize_layers({str(number): of_counts(row) for number, row in enumerate(counts)})
    violations = sorted(max(row) * len(row) / sum(row) - 1 for row in counts)
    variations = sorted(math.sqrt(sum((n * len(row) / sum(row) - 1) ** 2 for n in row) / len(row)) for row in counts)
    for name, values in (("max_violation", violations), ("load_cv", variations)):
        middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
        levels = [found[f"{name}/{level}"] for level in ("best", "median", "worst")]
        assert levels == pytest.approx([values[0], middle, values[-1]], abs=1e-9)
    assert found["num_dead_experts"] == sum(n * len(row) < 0.01 * sum(row) or n == 0 for row in counts for n in row)
    assert found["relative_effective_experts/worst"] <= found["relative_effective_experts/best"]


def test_a_soft_layer_is_judged_by_its_weights() -> None:
    soft = head_of([1, 0, 0, 0], soft=True, importance=torch.full((4,), 0.25), dead_experts=(), starved_experts=())
    assert Layer.of_head(soft).relative.tolist() == [1, 1, 1, 1]
    stats = replace(stats_of([4, 0]), gate_sum=torch.tensor([2.0, 2.0]))
    assert Layer.of_stats(stats, True, 0.01, 0.25, {}).dead == ()
    assert Layer.of_stats(stats, False, 0.01, 0.25, {}).dead == (1,)


def test_unknown_numbers_are_left_out() -> None:
    known, unknown = head_of([1, 1]), head_of([1, 3], entropy=math.nan, entropy_of_mean=math.nan, margin=math.nan)
    both = summarize_layers({"a": Layer.of_head(known), "b": Layer.of_head(unknown)})
    assert both["relative_entropy/lowest"] == both["relative_entropy/highest"] == pytest.approx(0.5 / math.log(2))
    assert all(math.isfinite(value) for value in both.values())
    one = of_counts([1, 3])
    neither = summarize_layers({"b": Layer(one.relative, (), (), {"load_cv": 1.0})})
    assert not any("entropy" in key for key in neither)


def test_a_layer_without_a_row_does_not_count_as_dead() -> None:
    empty = of_counts([0, 0], load_cv=math.nan)
    assert empty.dead == () and empty.relative.isnan().all()
    found = summarize_layers({"a": of_counts([2, 2]), "b": empty})
    assert (found["num_dead_experts"], found["load_cv/worst"]) == (0, 0)
    # no number of an earlier epoch must remain, as with a single head
    alone = summarize_layers({"b": empty})
    assert math.isnan(alone["load_cv/worst"])
    assert "num_dead_experts" not in alone
    assert math.isnan(training_numbers({"b": empty}, "summary", True)["relative_load/p50"])


def test_one_expert_has_no_relative_entropy() -> None:
    assert "relative_entropy" not in Layer.of_head(head_of([1.0])).measures


def test_the_worst_layer_is_that_with_the_most_dead_experts_and_then_the_fewest_effective_ones() -> None:
    loads = [1, 1, 1, 1], [3, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [5, 1, 1, 1]
    assert worst_first(layers(*map(list, loads))) == ["layers.3", "layers.2", "layers.4", "layers.1", "layers.0"]


def test_the_number_of_keys_does_not_depend_on_the_size() -> None:
    def keys(num_layers: int, num_experts: int) -> list[str]:
        heads = heads_of(num_layers, num_experts, mutual_information=0.1)
        of_split = summarize_layers({name: Layer.of_head(head) for name, head in heads.items()})
        rest = {"nonfinite": 0.0, "routing_flips": 0.1}
        of_epoch = {name: of_counts([1] * num_experts, **rest) for name in heads}
        of_training = training_numbers(of_epoch, "summary", True)
        return [f"{split}/{key}" for split in ("train", "test") for key in (*of_split, "partial")] + list(of_training)

    assert keys(48, 128) == keys(2, 4)
    assert len(keys(48, 128)) <= 60


def test_a_single_layer_keeps_its_numbers_without_those_that_follow_from_others() -> None:
    few = {"head": of_counts([3] * 16)}
    full, summary = training_numbers(few, "full", False), training_numbers(few, "summary", False)
    left_out = {f"head/importance_{e}" for e in range(16)} | {f"head/relative_load_p{p}" for p in (10, 50, 90)}
    assert full.keys() - summary.keys() == left_out
    assert summary.items() <= full.items()
    many = {"head": of_counts([3] * 17)}
    assert "head/relative_load_p50" in training_numbers(many, "summary", False)
    assert training_numbers(few | {"other": of_counts([1, 1])}, "full", True).keys() >= full.keys()

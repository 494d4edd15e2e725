"""The matching against brute force over all permutations."""

from collections.abc import Iterator, Sequence
from itertools import permutations, product

import pytest
import torch
from torch import Tensor, nn

from moe_heads import SparseMoE
from moe_heads.analysis.weight_matching.expert_group import ExpertGroup
from moe_heads.analysis.weight_matching.function import match_weights
from moe_heads.analysis.weight_matching.group import Group, Orders
from moe_heads.analysis.weight_matching.tensors import tensors_of
from moe_heads.analysis.weight_matching.tracing import find_groups
from moe_heads.analysis.weight_matching.unit_group import UnitGroup
from tests.support.matching import cross_entropy, scatter


def all_orders(group: Group) -> Iterator[Orders]:
    if isinstance(group, UnitGroup):
        yield from ((torch.tensor(order),) for order in permutations(range(group.size)))
        return
    assert isinstance(group, ExpertGroup)
    (inner,) = group.inside
    experts = permutations(range(group.num_experts))
    hidden = list(product(permutations(range(inner.size)), repeat=group.num_experts))
    yield from ((torch.tensor(order), torch.tensor(inside)) for order in experts for inside in hidden)


def smallest_distance(groups: Sequence[Group], first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    if not groups:
        return sum(float((first[name] - second[name]).square().sum()) for name in first) ** 0.5
    group, *others = groups
    return min(
        smallest_distance(others, first, {**second, **group.apply(second, orders)}) for orders in all_orders(group)
    )


NETS = {
    "one layer": lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)),
    "two layers": lambda: nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)),
    "experts": lambda: SparseMoE(2, 3, num_experts=3, expert_width=2, k=2, num_shared_experts=0),
}


@pytest.mark.parametrize("name", NETS)
def test_no_permutation_comes_closer(name: str) -> None:
    batch = torch.randn(6, 2), torch.randint(3, (6,))
    for _ in range(4):
        first, second = scatter(NETS[name]()), scatter(NETS[name]())
        match = match_weights(first, tensors_of(second), cross_entropy, batch, num_restarts=20)
        groups = find_groups(first, cross_entropy, batch)
        best = smallest_distance(groups, tensors_of(first), tensors_of(second))
        assert match.distance_after == pytest.approx(best, rel=1e-5)
        assert match.distance_after <= match.distance_before


def test_the_result_does_not_depend_on_the_seed_of_the_user() -> None:
    first, second = scatter(NETS["two layers"]()), scatter(NETS["two layers"]())
    batch = torch.randn(6, 2), torch.randint(3, (6,))
    torch.manual_seed(1)
    one = match_weights(first, tensors_of(second), cross_entropy, batch)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    other = match_weights(first, tensors_of(second), cross_entropy, batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)

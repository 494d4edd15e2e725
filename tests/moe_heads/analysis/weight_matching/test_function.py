import pytest
import torch
from torch import nn

from moe_heads.analysis.weight_matching.function import match_weights
from moe_heads.analysis.weight_matching.tensors import tensors_of, unequal_shapes
from moe_heads.analysis.weight_matching.unit_group import UnitGroup
from tests.support.matching import cross_entropy, permute_randomly, scatter


def network() -> nn.Module:
    return scatter(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)))


BATCH = (torch.randn(6, 2), torch.randint(3, (6,)))


def test_the_model_and_the_other_weights_are_unchanged() -> None:
    model, other = network().train(), tensors_of(network())
    before, others = tensors_of(model), {name: tensor.clone() for name, tensor in other.items()}
    match_weights(model, other, cross_entropy, BATCH)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(model).items())
    assert all(torch.equal(tensor, others[name]) for name, tensor in other.items())


def test_a_group_that_changes_the_loss_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong rule, which derives permutations of a layer whose output is flipped."""
    from moe_heads.analysis.weight_matching import rules

    class Flipped(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).flip(1))

    monkeypatch.setitem(rules.RULES, "flip", lambda traced, output, x, dims: traced.of(x))
    model, other = (scatter(Flipped(nn.Linear(2, 4), nn.Linear(4, 3))) for _ in range(2))
    match = match_weights(model, tensors_of(other), cross_entropy, BATCH)
    assert list(match.failed) == ["0"] and "changes the loss from" in match.failed["0"]
    assert match.distance_after == match.distance_before and not match.groups


def test_a_layer_without_float64_is_checked_in_its_own_precision() -> None:
    class Single(nn.Sequential):
        def forward(self, x):
            if x.dtype == torch.float64:
                raise RuntimeError("not in float64")
            return super().forward(x)

    model, other = (scatter(Single(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))) for _ in range(2))
    match = match_weights(model, tensors_of(other), cross_entropy, BATCH)
    assert not match.failed and match.distance_after < match.distance_before


def test_other_shapes_are_an_error_that_names_them() -> None:
    model = network()
    other = {**tensors_of(model), "3.weight": torch.zeros(3, 5)}
    with pytest.raises(ValueError, match=r"other: expected .* 3.weight of shape \(3, 5\) instead of \(3, 4\)"):
        match_weights(model, other, cross_entropy, BATCH)
    assert unequal_shapes(tensors_of(model), {}) == "no 0.weight"
    assert unequal_shapes({}, {"x": torch.zeros(1)}) == "another tensor, x"


def test_nan_weights_are_an_error() -> None:
    model = network()
    other = {**tensors_of(model), "3.weight": torch.full((3, 4), torch.nan)}
    with pytest.raises(ValueError, match="weights: expected finite numbers"):
        match_weights(model, other, cross_entropy, BATCH)


def test_a_unit_group_composes_and_applies_in_order() -> None:
    model = network()
    from moe_heads.analysis.weight_matching.tracing import find_groups

    (group,) = find_groups(model, cross_entropy, BATCH)
    assert isinstance(group, UnitGroup) and group.size == 4
    assert "1.running_mean" in group.names and "3.weight" in group.names
    one, then = (group.random(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    tensors = tensors_of(model)
    stepwise = group.apply(group.apply(tensors, one), then)
    at_once = group.apply(tensors, group.compose(one, then))
    assert all(torch.equal(stepwise[name], at_once[name]) for name in group.names)


class Split(nn.Module):
    """Two halves of one layer's units, each with a consumer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.a(x))
        return self.b(hidden[:, :8]) + self.c(hidden[:, 8:])


def test_units_of_one_layer_in_two_groups_are_found_again() -> None:
    model, batch = Split(), (torch.randn(64, 6), torch.randint(4, (64,)))
    permuted = permute_randomly(model, cross_entropy, batch)
    match = match_weights(model, permuted, cross_entropy, batch)
    assert [group.name for group in match.groups] == list(match.orders) == ["a (1 of 2)", "a (2 of 2)"]
    assert match.distance_before > 0.1 and match.distance_after == 0


class Tied(nn.Module):
    """A weight under two names, and a buffer that is not in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh() * self.scale)


def test_a_state_dict_with_tied_weights_is_enough_and_gets_all_its_names_back() -> None:
    model, other, batch = Tied(), Tied(), (torch.randn(20, 5), torch.randint(5, (20,)))
    match = match_weights(model, other.state_dict(), cross_entropy, batch)
    assert set(other.state_dict()) <= set(match.tensors)
    expected = other(batch[0])
    other.load_state_dict({name: match.tensors[name] for name in other.state_dict()})
    torch.testing.assert_close(other(batch[0]), expected)

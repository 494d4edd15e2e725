import pytest
import torch
from torch import nn

from moe_heads.analysis.weight_matching.function import match_weights
from moe_heads.analysis.weight_matching.tensors import tensors_of, unequal_shapes
from moe_heads.analysis.weight_matching.unit_group import UnitGroup
from tests.support.matching import cross_entropy, scatter


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

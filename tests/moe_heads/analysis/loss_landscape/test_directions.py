import pytest
import torch
from torch import nn

from moe_heads import SparseMoE
from moe_heads.analysis.loss_landscape.directions import (
    filter_normalized,
    layer_normalized,
    random_direction,
    split_direction,
    trainable_parameters,
)


def test_random_direction_is_standard_normal_and_depends_on_the_seed_alone() -> None:
    model = nn.Linear(200, 100)
    state = torch.get_rng_state()
    first = random_direction(model, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(random_direction(model, seed=1), first)
    assert not torch.equal(random_direction(model, seed=2), first)
    # five standard errors of the mean and of the variance of 20,100 normal numbers
    assert abs(first.mean()) < 5 / len(first) ** 0.5
    assert abs(first.var() - 1) < 5 * (2 / len(first)) ** 0.5


def test_parts_follow_the_order_of_named_parameters_without_frozen_and_repeated_ones() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    model[1].weight.requires_grad_(False)
    assert list(trainable_parameters(model)) == ["0.weight", "0.bias", "1.bias", "2.bias"]
    parts = split_direction(model, torch.arange(10.0))
    assert parts["0.weight"].tolist() == [[0, 1], [2, 3]]
    assert parts["2.bias"].tolist() == [8, 9]


def test_each_filter_gets_the_norm_of_the_models_own_and_keeps_its_orientation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    direction = random_direction(model)
    parts = split_direction(model, filter_normalized(model, direction))
    raw = split_direction(model, direction)
    for name in ("0.weight", "3.weight"):
        weight = model.get_parameter(name)
        for part, given, own in zip(parts[name], raw[name], weight, strict=True):
            torch.testing.assert_close(part, given / given.norm() * own.norm())
    for name in ("0.bias", "1.weight", "1.bias", "3.bias"):
        assert not parts[name].any()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_filter_of_a_transposed_convolution_is_what_feeds_one_output_channel(groups: int) -> None:
    model = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    direction = random_direction(model)
    scaled = split_direction(model, filter_normalized(model, direction))["weight"]
    raw, own = split_direction(model, direction)["weight"], model.weight.detach()
    for channel in range(6):
        group, place = divmod(channel, 6 // groups)
        inputs = slice(group * 4 // groups, (group + 1) * 4 // groups)
        given, length = raw[inputs, place], own[inputs, place].norm()
        torch.testing.assert_close(scaled[inputs, place], given / given.norm() * length)
        # that those are the weights of the channel: without them it gives its bias
        silent = own.clone()
        silent[inputs, place] = 0
        output = torch.nn.functional.conv_transpose2d(torch.randn(1, 4, 5, 5), silent, groups=groups)
        assert not output[:, channel].any() and bool(output.any())


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm((3, 4)),
        nn.RMSNorm((3, 4)),
        nn.GroupNorm(1, 3),
        nn.BatchNorm1d(3),
        nn.InstanceNorm1d(3, affine=True),
    ],
)
def test_parameters_of_norm_layers_stay_whatever_their_shape(norm: nn.Module) -> None:
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(12, 2, bias=False))
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    direction = random_direction(model)
    for normalize in (filter_normalized, layer_normalized):
        parts = split_direction(model, normalize(model, direction))
        assert not any(parts[f"0.{name}"].any() for name, _ in norm.named_parameters())
        parts = split_direction(model, normalize(model, direction, biases="normalized"))
        for name, own in norm.named_parameters():
            assert parts[f"0.{name}"].norm() == pytest.approx(own.norm().item(), rel=1e-5)  # each as a whole


def test_a_zero_filter_stays_zero() -> None:
    model = nn.Linear(3, 2, bias=False)
    model.weight.data[0] = 0
    direction = torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 0.0])
    assert not filter_normalized(model, direction).any()


def test_stacked_experts_are_normalized_by_expert_and_unit() -> None:
    model = SparseMoE(6, 3, num_experts=4, expert_width=5)
    direction = random_direction(model)
    parts, raw = split_direction(model, filter_normalized(model, direction)), split_direction(model, direction)
    for name in ("experts.fc1.weight", "experts.fc2.weight"):
        own = model.get_parameter(name).detach()
        for expert in range(4):
            for unit in range(own.shape[1]):
                row = raw[name][expert, unit]
                torch.testing.assert_close(parts[name][expert, unit], row / row.norm() * own[expert, unit].norm())
    assert not parts["experts.fc1.bias"].any()
    assert not parts["experts.fc2.bias"].any()


def test_normalization_removes_the_scale_of_a_relu_network() -> None:
    """Scaling a unit's inputs by c and its outputs by 1/c scales the direction's filters alike."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    direction = random_direction(model)
    before = split_direction(model, filter_normalized(model, direction))
    model[0].weight.data *= 10
    after = split_direction(model, filter_normalized(model, direction))
    torch.testing.assert_close(after["0.weight"], 10 * before["0.weight"])
    torch.testing.assert_close(after["2.weight"], before["2.weight"])


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (torch.ones(3), r"direction: expected shape \(6,\), one entry for each trainable parameter, got \(3,\)"),
        (torch.ones(6, 1), r"direction: expected shape \(6,\).*got \(6, 1\)"),
        (torch.tensor([1, 1, 1, 1, 1, torch.nan]), "direction: expected finite entries, got 1 nan or inf"),
    ],
)
def test_bad_directions(direction: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        filter_normalized(nn.Linear(2, 2), direction)


def test_models_without_a_direction() -> None:
    with pytest.raises(ValueError, match="model: expected at least one parameter that requires a gradient, got none"):
        random_direction(nn.ReLU())
    with pytest.raises(ValueError, match=r"model: expected initialized parameters, got a lazy 'weight'"):
        random_direction(nn.LazyLinear(2))

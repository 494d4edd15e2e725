import warnings

import pytest
import torch
from torch import nn

from moe_heads.analysis.sharpness.hessian.parameters import selected_parameters
from tests.support.hessians import small_mlp


def test_keeps_the_order_of_the_model_and_leaves_frozen_ones_out() -> None:
    model = small_mlp()
    assert list(selected_parameters(model, [model[2].bias, model[0].weight])) == ["0.weight", "2.bias"]
    model[0].weight.requires_grad_(False)
    assert list(selected_parameters(model, None)) == ["0.bias", "2.weight", "2.bias"]


def test_shared_parameters_count_once() -> None:
    layer = nn.Linear(3, 3)
    assert list(selected_parameters(nn.Sequential(layer, layer), None)) == ["0.weight", "0.bias"]


def test_bad_parameters() -> None:
    with pytest.raises(ValueError, match=r"model: .*requires a gradient, got none"):
        selected_parameters(small_mlp().requires_grad_(False), None)
    with pytest.raises(ValueError, match=r"model: .*on one device, got .*bfloat16"):
        selected_parameters(small_mlp(torch.bfloat16), None)
    mixed = small_mlp()
    mixed[2].float()
    with pytest.raises(ValueError, match=r"model: .*float32 on cpu.*float64 on cpu"):
        selected_parameters(mixed, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"a lazy '0\.weight'"):
        selected_parameters(lazy, None)
    model = small_mlp()
    with pytest.raises(ValueError, match=r"params: .*got a tensor of shape \(3,\)"):
        selected_parameters(model, [model[0].weight, torch.zeros(3)])


def test_a_shared_parameter_may_be_meant_by_any_of_its_names() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    assert list(selected_parameters(model, ["head"])) == ["embed.weight"]

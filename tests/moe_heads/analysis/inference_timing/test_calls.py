import pytest
import torch
from torch import nn

from moe_heads import SparseMoE
from moe_heads.analysis.inference_timing.calls import Call, in_turn, named_modules


def test_a_call_is_whole_when_it_has_arguments() -> None:
    call = Call(lambda a, *, b: a - b, (3,), {"b": 1})
    assert call() == 2
    assert call.is_whole
    assert not Call(lambda: 1).is_whole


def test_names_are_checked_and_a_child_called_model_is_not_the_whole() -> None:
    wrapper = nn.Sequential()
    wrapper.add_module("model", SparseMoE(4, 2, num_experts=2, expert_width=2, k=1))
    assert list(named_modules(wrapper, None)) == ["model.model", "model.model.router"]
    assert list(named_modules(wrapper, ["model.experts"])) == ["model.model.experts"]
    with pytest.raises(ValueError, match=r"modules: expected names of modules, such as 'model', got \['neck'\]"):
        named_modules(wrapper, ["neck"])


def test_calls_in_turn_run_all_and_renew_what_each_writes_into() -> None:
    layer, x, y = nn.ReLU(inplace=True), torch.tensor([-1.0]), torch.tensor([-2.0, 2.0])
    calls = [Call(layer, (t,), written={0: t.clone()}) for t in (x, y)]
    assert in_turn(calls[:1]) is calls[0]
    both = in_turn(calls)
    assert both.module is layer
    assert [t is given for t, given in zip(both.inputs, (x, y), strict=True)] == [True, True]
    both()
    assert (x.tolist(), y.tolist()) == ([0.0], [0.0, 2.0])
    both.renew()
    assert (x.tolist(), y.tolist()) == ([-1.0], [-2.0, 2.0])

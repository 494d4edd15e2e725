import pytest
from torch import nn

from moe_heads import SparseMoE
from moe_heads.analysis.inference_timing.capture import named_modules


def test_names_are_checked_and_a_child_called_model_is_not_the_whole() -> None:
    wrapper = nn.Sequential()
    wrapper.add_module("model", SparseMoE(4, 2, num_experts=2, expert_width=2, k=1))
    assert list(named_modules(wrapper, None)[0]) == ["model.model", "model.model.router"]
    assert list(named_modules(wrapper, ["model.experts"])[0]) == ["model.model.experts"]
    with pytest.raises(ValueError, match=r"modules: expected names of modules, such as 'model', got \['neck'\]"):
        named_modules(wrapper, ["neck"])

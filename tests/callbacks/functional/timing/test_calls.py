import pytest
import torch
from torch import nn

from moe_heads import SparseMoE
from moe_heads.callbacks.functional.timing.calls import Call, call_of_model, capture, named_modules, resized
from tests.support.untouched import untouched


def forward(model: nn.Module, batch: torch.Tensor) -> object:
    return model(batch)


def test_a_call_is_whole_when_it_has_arguments() -> None:
    call = Call(lambda a, *, b: a - b, (3,), {"b": 1})
    assert call() == 2
    assert call.is_whole
    assert not Call(lambda: 1).is_whole


def test_a_batch_is_repeated_or_cut() -> None:
    batch = (torch.tensor([1, 2, 3]), torch.tensor(7), "name")
    assert resized(batch, 5)[0].tolist() == [1, 2, 3, 1, 2]
    assert resized(batch, 2)[0].tolist() == [1, 2]
    assert resized(batch, 2)[1:] == batch[1:]


def test_capturing_keeps_inputs_and_the_most_bytes_of_a_module() -> None:
    model, x = nn.Sequential(nn.Linear(2, 8), nn.ReLU(inplace=True), nn.Linear(8, 1)), torch.randn(4, 2)
    with untouched(model):
        captured = capture(call_of_model(forward, model, x), model, {"last": model[2], "first": model[0]})
    assert list(captured.calls) == ["last", "first"]
    assert torch.equal(captured.calls["first"].args[0], x)
    # the activation reads and writes 4 × 8 numbers each
    assert captured.num_bytes == 2 * 4 * 8 * 4


def test_a_compiled_model_is_captured_without_compiling_it() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compiled.append(1)
        return graph.forward

    model, x = nn.Sequential(nn.Linear(2, 3)), torch.randn(4, 2)
    model.compile(backend=backend)
    captured = capture(call_of_model(forward, model, x), model, {"0": model[0]})
    assert torch.equal(captured.calls["0"].args[0], x)
    assert not compiled


def test_names_are_checked_and_a_child_called_model_is_not_the_whole() -> None:
    wrapper = nn.Sequential()
    wrapper.add_module("model", SparseMoE(4, 2, num_experts=2, expert_width=2, k=1))
    assert list(named_modules(wrapper, None)) == ["model.model", "model.router"]
    assert list(named_modules(wrapper, ["model.experts"])) == ["model.experts"]
    with pytest.raises(ValueError, match=r"modules: expected names of modules, such as 'model'; got \['neck'\]"):
        named_modules(wrapper, ["neck"])

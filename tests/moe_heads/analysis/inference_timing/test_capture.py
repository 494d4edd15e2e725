import torch
from torch import Tensor, nn

from moe_heads.analysis.inference_timing.calls import MODEL, call_of_model
from moe_heads.analysis.inference_timing.capture import capture
from moe_heads.analysis.inference_timing.counting import Recorder
from tests.support.untouched import untouched


def forward(model: nn.Module, batch: torch.Tensor) -> object:
    return model(batch)


def test_capturing_keeps_inputs_and_the_most_bytes_at_once() -> None:
    model, x = nn.Sequential(nn.Linear(2, 8), nn.ReLU(inplace=True), nn.Linear(8, 1)), torch.randn(4, 2)
    named = {"last": model[2], "first": model[0]}
    with untouched(model), torch.inference_mode():
        captured = capture(call_of_model(forward, model, x), model, named, Recorder())
    assert list(captured.calls) == ["last", "first"]
    assert torch.equal(captured.calls["first"].args[0], x)
    # at once the hidden layer and the output, 4 × (8 + 1); kept are the batch and the inputs, 4 × (2 + 2 + 8)
    assert captured.num_bytes == 4 * 4 * (9 + 12)


def test_a_compiled_model_is_captured_without_compiling_it() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compiled.append(1)
        return graph.forward

    model, x = nn.Sequential(nn.Linear(2, 3)), torch.randn(4, 2)
    model.compile(backend=backend)
    captured = capture(call_of_model(forward, model, x), model, {"0": model[0]}, Recorder())
    assert torch.equal(captured.calls["0"].args[0], x)
    assert not compiled


class Siamese(nn.Module):
    """Calls its encoder twice, on different numbers of samples; the encoder calls itself once inside."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Recursive()

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x) + self.encoder(x[:1] + 1)


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        return self(self.linear(x), depth - 1) if depth else self.linear(x)


def test_all_calls_of_a_module_are_kept_and_counted_those_inside_itself_once() -> None:
    model, x = Siamese(), torch.randn(4, 3)
    seen: list[int] = []
    with torch.inference_mode():
        captured = capture(call_of_model(forward, model, x), model, {"encoder": model.encoder}, Recorder())
        model.encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        captured.calls["encoder"]()
    assert seen == [4, 4, 1, 1]
    assert captured.counted["encoder"].flops == captured.counted[MODEL].flops == 2 * 2 * 3 * 3 * (4 + 1)
    assert captured.calls["encoder"].inputs[1].tolist() == (x[:1] + 1).tolist()


def test_what_is_copied_to_be_kept_is_no_operator_of_the_model() -> None:
    model, x = nn.Sequential(nn.ReLU()), torch.randn(4, 3)
    with torch.inference_mode():
        captured = capture(call_of_model(forward, model, x), model, {"0": model[0]}, Recorder())
    assert len(captured.counted[MODEL].operators) == 1

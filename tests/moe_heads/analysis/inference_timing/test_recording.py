import torch
from torch import Tensor, nn

from moe_heads.analysis.inference_timing.calls import MODEL, Call
from moe_heads.analysis.inference_timing.flops import OperatorRecorder
from moe_heads.analysis.inference_timing.recording import Capture, recorded
from tests.support.untouched import untouched


def capture(model: nn.Module, x: Tensor, named: dict[str, nn.Module]) -> Capture:
    forward = Call(lambda model, batch: model(batch), (((model, x), {}),))
    with torch.inference_mode():
        return recorded(forward, named, OperatorRecorder())


def test_the_inputs_of_modules_are_kept() -> None:
    model, x = nn.Sequential(nn.Linear(2, 8), nn.ReLU(inplace=True), nn.Linear(8, 1)), torch.randn(4, 2)
    with untouched(model):
        captured = capture(model, x, {"last": model[2], "first": model[0]})
    assert list(captured.modules) == ["last", "first"]
    assert torch.equal(captured.modules["first"].inputs[0], x)


def test_a_compiled_model_is_captured_without_compiling_it() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compiled.append(1)
        return graph.forward

    model, x = nn.Sequential(nn.Linear(2, 3)), torch.randn(4, 2)
    model.compile(backend=backend)
    assert torch.equal(capture(model, x, {"0": model[0]}).modules["0"].inputs[0], x)
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
    lengths: list[int] = []
    captured = capture(model, x, {"encoder": model.encoder})
    model.encoder.register_forward_pre_hook(lambda _, args: lengths.append(len(args[0])))
    with torch.inference_mode():
        captured.modules["encoder"]()
    assert lengths == [4, 4, 1, 1]
    assert captured.operators["encoder"].flops == captured.operators[MODEL].flops == 2 * 2 * 3 * 3 * (4 + 1)
    assert captured.modules["encoder"].inputs[1].tolist() == (x[:1] + 1).tolist()


def test_inputs_of_two_calls_that_are_modified_in_place_are_restored() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x - 1) + self.inner(x + 1)

    model, x = Twice(), torch.tensor([-2.0, 2.0])
    call = capture(model, x, {"inner": model.inner}).modules["inner"]
    assert [x.tolist() for x in call.inputs] == [[-3, 1], [-1, 3]]
    with torch.inference_mode():
        call()
        assert [x.tolist() for x in call.inputs] == [[0, 1], [0, 3]]
        call.restore_inputs()
    assert [x.tolist() for x in call.inputs] == [[-3, 1], [-1, 3]]


def test_copies_of_inputs_are_no_operators_of_the_model() -> None:
    model = nn.Sequential(nn.ReLU())
    assert len(capture(model, torch.randn(4, 3), {"0": model[0]}).operators[MODEL].operators) == 1

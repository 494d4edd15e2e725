"""Each mode computes the same function as the eager model and does not change the model."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moe_heads.analysis import inference_timing
from moe_heads.analysis.inference_timing.calls import Call
from moe_heads.analysis.inference_timing.modes import ModeUnavailableError, in_mode
from tests.support.untouched import untouched

CPU = torch.device("cpu")


def call_of(function: Callable[..., object], *args: object) -> Call:
    return Call(function, ((args, {}),))


class Net(nn.Module):
    """A model that records its memory formats and data types."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.same = self.convs  # two names, one module
        self.seen: list[tuple[bool, torch.dtype]] = []
        self.unpicklable = (n for n in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.convs[0].weight
        last = all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight))
        out: Tensor = self.same(x)
        self.seen.append((last, out.dtype))
        return out


def model_and_batch() -> tuple[Net, tuple[Tensor, Tensor]]:
    return Net().eval(), (torch.randn(2, 3, 8, 8), torch.zeros(2))


def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> object:
    return model(batch[0])


def test_channels_last_converts_a_copy() -> None:
    model, batch = model_and_batch()
    call = call_of(forward, model, batch)
    expected = call()
    with untouched(model):
        run = in_mode("channels_last", call, CPU)
        torch.testing.assert_close(run(), expected)
    assert [last for last, _ in model.seen] == [False, True]
    assert model.convs[0].weight.is_contiguous()
    assert batch[0].is_contiguous()
    # a module by itself as well
    torch.testing.assert_close(in_mode("channels_last", call_of(model, batch[0]), CPU)(), expected)
    assert model.seen[-1][0]


def test_channels_last_needs_images() -> None:
    with pytest.raises(ModeUnavailableError, match="needs a 4-D input; the module has none"):
        in_mode("channels_last", call_of(nn.Linear(2, 2), torch.zeros(1, 2)), CPU)


def test_a_cuda_graph_needs_a_cuda_device() -> None:
    with pytest.raises(ModeUnavailableError, match="needs a CUDA device; the model is on cpu"):
        in_mode("cuda_graph", call_of(nn.Linear(2, 2), torch.zeros(1, 2)), CPU)


def test_bf16_computes_in_bf16_and_ends_with_the_run() -> None:
    model, batch = model_and_batch()
    in_mode("bf16", call_of(forward, model, batch), CPU)()
    assert model.seen[-1][1] == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    assert model.convs[0].weight.dtype == torch.float32


def test_eager_is_the_call_itself() -> None:
    call = call_of(nn.Linear(2, 2), torch.zeros(1, 2))
    assert in_mode("eager", call, CPU) is call


def test_compiling_takes_a_backend_and_keeps_no_program_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, plain = [], torch.compile

    def with_backend(function: object, **options: object) -> object:
        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
            compiled.append(1)
            return graph.forward

        return plain(function, backend=backend, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "compile", with_backend)
    layer = nn.Linear(4, 3)
    before = copy.copy(vars(layer))
    # more shapes than torch compiles one function for
    sizes = range(2, 14)
    for size in sizes:
        x = torch.randn(size, 4)
        run = in_mode("compiled", call_of(layer, x), CPU)
        torch.testing.assert_close(run(), layer(x))
    assert len(compiled) == len(sizes)
    assert vars(layer) == before
    # several runs in a pass are one program
    in_mode("compiled", Call(layer, tuple(((torch.randn(size, 4),), {}) for size in sizes)), CPU)()
    assert len(compiled) == len(sizes) + 1


def test_a_compiled_timing_leaves_no_mark_on_the_parameters() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    timing = inference_timing(model, x, batch_sizes=[2], modules=[], modes=["compiled"], num_runs=2, warmup_runs=0)
    assert [row.mode for row in timing.rows] == ["compiled"]
    assert [vars(parameter) for parameter in model.parameters()] == [{}, {}]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_replays_the_call() -> None:
    layer, x = nn.Linear(8, 8, device="cuda"), torch.randn(4, 8, device="cuda")
    with torch.inference_mode():
        run = in_mode("cuda_graph", call_of(layer, x), x.device)
        run()
    torch.cuda.synchronize()

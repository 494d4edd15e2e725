"""Each mode computes the same function as the eager model and does not change the model."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moe_heads.analysis import inference_timing
from moe_heads.analysis.inference_timing.calls import (
    Call,
    ModeUnavailableError,
    check_resizable,
    in_mode,
    num_samples,
    resized,
)
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


def test_a_call_runs_once_for_each_of_its_arguments() -> None:
    runs = []
    call = Call(lambda a, *, b: runs.append(a - b), (((3,), {"b": 1}), ((5,), {"b": 1})))
    call()
    assert runs == [2, 4]
    assert not call.is_stage
    assert Call(lambda: 1).is_stage


def test_a_batch_is_repeated_or_cut() -> None:
    batch = (torch.tensor([1, 2, 3]), torch.tensor(7), "name")
    assert resized(batch, 5)[0].tolist() == [1, 2, 3, 1, 2]
    assert resized(batch, 2)[0].tolist() == [1, 2]
    assert resized(batch, 2)[1:] == batch[1:]


PACKED = nn.utils.rnn.pack_padded_sequence(torch.zeros(3, 5, 2), torch.tensor([5, 4, 2]), batch_first=True)


@pytest.mark.parametrize(
    ("stays", "named"),
    [
        (PACKED, "a PackedSequence of 3 sequences"),
        (
            torch.nested.nested_tensor([torch.zeros(n, 2) for n in (5, 4, 2)], layout=torch.jagged),
            "a nested tensor of 3",
        ),
        (torch.zeros(7, 3, dtype=torch.bool), r"a tensor of shape \(7, 3\)"),
        (torch.zeros(6, 7, 7), r"a tensor of shape \(6, 7, 7\)"),
    ],
)
def test_entries_that_count_the_samples_elsewhere_are_named(stays: object, named: str) -> None:
    batch = {"x": torch.zeros(3, 7), "stays": stays}
    with pytest.raises(ValueError, match=f"example_batch: expected tensors whose first .* the 3 samples.* got {named}"):
        check_resizable(batch)


def test_a_model_of_packed_sequences_runs_at_the_size_of_its_example_only() -> None:
    options = {"num_runs": 2, "warmup_runs": 0}
    with pytest.raises(ValueError, match=r"example_batch: .* got a PackedSequence of 3 sequences"):
        inference_timing(nn.LSTM(2, 4), PACKED, batch_sizes=[1, 3], **options)
    timing = inference_timing(nn.LSTM(2, 4), PACKED, batch_sizes=[3], **options)
    # eleven steps in all, four gates
    assert timing.rows[0].flops == 2 * 11 * 4 * 4 * (2 + 4)


def test_what_does_not_count_the_samples_is_no_mistake() -> None:
    check_resizable({"x": torch.zeros(3, 7), "weights": torch.zeros(6), "vocabulary": torch.zeros(8, 4), "name": "x"})
    check_resizable({"x": torch.zeros(1, 7), "table": torch.zeros(9, 1)})
    with pytest.raises(ValueError, match="example_batch: expected a batch that holds a batched tensor, got dict"):
        num_samples({"n": 1})

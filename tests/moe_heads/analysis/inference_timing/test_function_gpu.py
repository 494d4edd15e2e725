"""The timing on a GPU: device time, CUDA graphs and memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moe_heads import SparseMoE
from moe_heads.analysis.inference_timing.function import inference_timing


def on_cuda(test: Callable[[], None]) -> Callable[[], None]:
    needs = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(needs(test))


class Waiting(nn.Linear):
    """Keeps the device busy for some milliseconds: the launches are negligible."""

    def forward(self, x: Tensor) -> Tensor:
        torch.cuda._sleep(20_000_000)
        return super().forward(x)


@on_cuda
def test_device_time_is_apart_from_wall_time_and_memory_is_known() -> None:
    model = nn.Sequential(nn.Linear(64, 64), SparseMoE(64, 10)).cuda()
    timing = inference_timing(model, torch.randn(4, 64), batch_sizes=[4, 64], num_runs=50)
    for row in timing.rows:
        assert 0 < row.device_p50_ms <= row.p50_ms
        assert row.peak_memory > 0
    (row,) = inference_timing(Waiting(2, 2).cuda(), torch.zeros(1, 2), batch_sizes=[1]).rows
    assert row.device_p50_ms == pytest.approx(row.p50_ms, rel=0.05)


@on_cuda
def test_the_device_time_agrees_with_triton_within_five_percent() -> None:
    testing = pytest.importorskip("triton.testing", reason="needs triton")
    module, x = nn.Linear(4096, 4096).cuda(), torch.randn(2048, 4096, device="cuda")
    (row,) = inference_timing(module, x, batch_sizes=[len(x)]).rows
    with torch.inference_mode():
        theirs = testing.do_bench(lambda: module(x), return_mode="median")
    assert row.device_p50_ms == pytest.approx(theirs, rel=0.05)


@on_cuda
def test_a_cuda_graph_is_a_row_and_no_slower_than_the_launches_that_it_saves() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(50))).cuda()
    timing = inference_timing(model, torch.randn(1, 64), batch_sizes=[1], modes=["eager", "cuda_graph"], modules=[])
    rows = {row.mode: row for row in timing.rows}
    assert timing.skipped == ()
    assert rows["cuda_graph"].p50_ms < rows["eager"].p50_ms


class Hungry(nn.Module):
    """Allocates a terabyte from four samples on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) >= 4:
            torch.empty(2**40, dtype=torch.uint8, device=x.device)
        return x * self.weight


@on_cuda
def test_a_size_that_memory_does_not_hold_is_named_and_the_sweep_goes_on() -> None:
    timing = inference_timing(Hungry().cuda(), torch.zeros(1, 4), batch_sizes=[1, 4, 2], num_runs=5)
    assert [row.batch_size for row in timing.rows] == [1, 2]
    (skip,) = timing.skipped
    assert skip.batch_size == 4
    assert skip.reason.startswith("out of memory: OutOfMemoryError: CUDA out of memory.")

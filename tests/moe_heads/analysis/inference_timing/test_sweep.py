"""Batch sizes that the sweep skips for lack of time, with a fake clock, or of memory."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from moe_heads import SparseMoE
from moe_heads.analysis import InferenceTimingResult, inference_timing
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis.inference_timing import cost
from moe_heads.analysis.inference_timing.sweep import Sweep


class Outside:
    """Time and passes so far; unlike attributes of the model, they are not restored."""

    def __init__(self) -> None:
        self.now = 0.0
        self.passes: list[int] = []


class Costly(nn.Module):
    """A pass takes a given number of seconds per sample on a fake clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float, head: nn.Module | None = None) -> None:
        super().__init__()
        self.clock, self.seconds = Outside(), seconds
        self.head = nn.Identity() if head is None else head
        monkeypatch.setattr(cost.time, "perf_counter", lambda: self.clock.now)
        monkeypatch.setattr(cost.time, "perf_counter_ns", lambda: int(1e9 * self.clock.now))

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.seconds * len(x)
        self.clock.passes.append(len(x))
        return self.head(x)


@pytest.fixture(autouse=True)
def _no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the measurement of the device limits, whose clock does not advance here."""
    monkeypatch.setattr(Sweep, "_limits_of", lambda *_: None)


def timed(model: nn.Module, **options: object) -> tuple[InferenceTimingResult, list[int]]:
    settings = {"batch_sizes": (1, 8, 32, 128), "modules": [], **options}
    timing = inference_timing(model, torch.randn(2, 16), **settings)
    return timing, [row.batch_size for row in timing.rows if row.module == "model"]


def reasons(timing: InferenceTimingResult) -> Mapping[int | None, str]:
    return {skip.batch_size: skip.reason for skip in timing.skipped}


def test_the_sweep_stays_within_its_time_and_names_the_sizes_that_it_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Costly(monkeypatch, 0.1)
    timing, sizes = timed(model, max_seconds=30.0)
    # size 32: a pass of 3.2 s is made, seven rounds are not; size 128 is not even tried
    assert sizes == [1, 8]
    assert model.clock.now <= 30
    assert 128 not in model.clock.passes
    left = reasons(timing)
    assert left[32].startswith("needs about 22.4 s, but ")
    assert left[32].endswith(" of max_seconds = 30 remain")
    assert left[128] == "batch size 32 was already too slow"
    assert timing.partial == ""


def test_the_smallest_size_is_always_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timing, sizes = timed(Costly(monkeypatch, 100), batch_sizes=(4, 2), max_seconds=1.0)
    assert sizes == [2]
    assert timing.rows[0].num_runs == 6
    assert reasons(timing)[4].startswith("needs about 800 s, but 0 s")


def test_the_heads_are_timed_where_the_model_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    head = SparseMoE(16, 4, num_experts=4, expert_width=8)
    timing, sizes = timed(Costly(monkeypatch, 0.1, head), max_seconds=30.0, modules=["head"], num_runs=6)
    assert sizes == [1, 8]
    of_32 = {row.module for row in timing.rows if row.batch_size == 32}
    assert {"head", "head_dense"} <= of_32
    assert "model" not in of_32
    (left,) = (skip for skip in timing.skipped if skip.batch_size == 32)
    assert left.module == "model"
    assert [point.batch_size for point in timing.gaps[0].points][:3] == [1, 8, 32]


def test_the_warm_up_is_in_the_time_of_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Costly(monkeypatch, 0.01)
    timing, _ = timed(model, batch_sizes=(1,), seconds_per_size=2.0)
    (row,) = timing.rows
    # one pass to capture; the warm-up is stable after ten, and the rest of two seconds is left
    assert row.warmup_runs == 10
    assert model.clock.now == pytest.approx(0.01 + 2.0, abs=0.03)


def test_rounds_end_in_time_where_they_take_longer_than_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Costly(monkeypatch, 0.1)

    def busy(done: int, total: int | None, quantities: Mapping[str, float]) -> None:
        if quantities.get("batch_size") == 8:
            model.seconds = 0.5  # other work came in the first round of size 8

    options = {"max_seconds": 14.0, "batch_sizes": (1, 8), "progress": Progress(show=busy)}
    timing, sizes = timed(model, **options)
    assert sizes == [1, 8]
    assert model.clock.now <= 14
    assert timing.rows[1].num_runs < 6


class Hungry(nn.Module):
    """Runs out of memory from a batch size on, with the message of an allocator."""

    def __init__(self, limit: int, message: str = "DefaultCPUAllocator: can't allocate memory\nstack") -> None:
        super().__init__()
        self.limit, self.message = limit, message

    def forward(self, x: Tensor) -> Tensor:
        if len(x) >= self.limit:
            raise RuntimeError(self.message)
        return x


def test_out_of_memory_is_reported_and_the_sweep_goes_on() -> None:
    timing, sizes = timed(Hungry(8), batch_sizes=(1, 8, 32), num_runs=2)
    assert sizes == [1]
    reason = "out of memory: RuntimeError: DefaultCPUAllocator: can't allocate memory"
    assert reasons(timing) == {8: reason, 32: reason}


class Picky(nn.Module):
    """Fails at batches of less than two or more than four samples."""

    def forward(self, x: Tensor) -> Tensor:
        if not 2 <= len(x) <= 4:
            raise KeyError(f"not {len(x)}")
        return x


def test_a_size_at_which_the_model_fails_is_named_and_the_sweep_goes_on() -> None:
    timing, sizes = timed(Picky(), batch_sizes=(1, 2, 4, 8), num_runs=2)
    assert sizes == [2, 4]
    assert reasons(timing) == {1: "failed with KeyError: 'not 1'", 8: "failed with KeyError: 'not 8'"}
    with pytest.raises(
        ValueError,
        match=r"example_batch: expected a batch that the model accepts, got one that raises KeyError: 'not 8'",
    ):
        timed(Picky(), batch_sizes=(1, 8), num_runs=2)


def test_nothing_that_fits_is_an_empty_result_with_its_reasons() -> None:
    timing, sizes = timed(Hungry(1), batch_sizes=(1,), num_runs=2)
    assert sizes == []
    assert "out of memory" in timing.summary()
    assert timing.metrics() == {}
    timing.plot()

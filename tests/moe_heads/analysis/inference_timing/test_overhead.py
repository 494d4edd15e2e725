"""The constant cost of a timed call, with a fake clock and functions of known cost."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moe_heads.analysis import inference_timing
from moe_heads.analysis.inference_timing.calls import Call
from moe_heads.analysis.inference_timing.entries import call_request
from moe_heads.analysis.inference_timing.overhead import Overhead, null_of, overhead_of
from moe_heads.analysis.inference_timing.sweep import Sweep

CPU = torch.device("cpu")


class Outside:
    """A clock that each reading moves, as a real one does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ns_per_reading: list[int]) -> None:
        self.now, self.num_readings, self.costs = 0, 0, ns_per_reading
        monkeypatch.setattr(time, "perf_counter_ns", self.read)

    def read(self) -> int:
        self.num_readings += 1
        self.now += self.costs[self.num_readings % len(self.costs)]
        return self.now


class Known(nn.Module):
    """Takes 6 µs."""

    def __init__(self, clock: Outside) -> None:
        super().__init__()
        self.clock = clock

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += 6000
        return x


@pytest.mark.parametrize("costs", [[2500], [2400, 2600]])
@pytest.mark.parametrize("batch", [torch.zeros(2, 3), (torch.zeros(2, 3), torch.zeros(2)), {"x": torch.zeros(2, 3)}])
def test_a_call_of_6_us_takes_6_us(monkeypatch: pytest.MonkeyPatch, costs: list[int], batch: object) -> None:
    monkeypatch.setattr(Sweep, "_limits_of", lambda *_: None)
    model = Known(Outside(monkeypatch, costs))
    (row,) = inference_timing(model, batch, batch_sizes=[2], num_runs=40, warmup_runs=0).rows
    assert 2.4e-3 <= row.overhead_ms <= 2.6e-3
    assert row.p50_ms == pytest.approx(6e-3, abs=2e-4)
    # without the subtraction it would be 40 % more
    assert row.max_ms < 6.5e-3
    assert row.p50_low_ms <= row.p50_ms - row.overhead_error_ms
    assert row.p50_high_ms >= row.p50_ms + row.overhead_error_ms


def test_the_cost_has_the_interval_of_its_median() -> None:
    found = overhead_of([1.0] * 20 + [2.0] * 20 + [3.0] * 20)
    assert found.ms == 2.0
    assert found.error_ms == 1.0
    assert overhead_of([1.0] * 20) == Overhead(1.0, 0.0)
    assert overhead_of([]) == Overhead(0.0, 0.0)


def nothing(function: Callable[[], object]) -> object:
    null = null_of(function, CPU)
    assert null is not None
    return null()


def test_the_null_function_does_all_but_the_work() -> None:
    ran: list[object] = []

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        ran.append(model)

    whole = Call(forward, (((nn.Identity(), {"x": torch.zeros(2)}), {}),))
    assert nothing(whole) is None
    assert not ran
    model = nn.Linear(3, 2)
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    for batch in (torch.zeros(1, 3), [torch.zeros(1, 3)], {"input": torch.zeros(1, 3)}):
        request = Call(call_request, (((model, batch), {}),))
        assert nothing(request) is None
        assert not ran
        assert request().shape == (1, 2)
        ran.clear()
    assert nothing(lambda: ran.append(1)) is None
    assert not ran


def test_the_cost_is_part_of_the_time_on_a_gpu() -> None:
    assert null_of(lambda: None, torch.device("cuda")) is None


def test_the_summary_says_what_is_subtracted() -> None:
    timing = inference_timing(nn.Linear(3, 2), torch.zeros(2, 3), batch_sizes=[2], num_runs=20, warmup_runs=0)
    assert "The constant cost of a timed call, up to " in timing.summary()
    assert timing.rows[0].overhead_ms > 0

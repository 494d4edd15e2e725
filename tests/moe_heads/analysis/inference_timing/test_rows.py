import numpy as np
import pytest

from moe_heads.analysis.inference_timing.calls import RowKey
from moe_heads.analysis.inference_timing.clock import Reading
from moe_heads.analysis.inference_timing.flops import FlopCount
from moe_heads.analysis.inference_timing.measure import TimedCall
from moe_heads.analysis.inference_timing.rows import TimingRow, row_of
from tests.moe_heads.analysis.inference_timing.test_result import row


def test_two_runs_agree_within_their_intervals_and_the_allowance_for_drift() -> None:
    a = row("model", 1, 100.0, p50_low_ms=99.0, p50_high_ms=101.0)
    b, far = (row("model", 1, ms, p50_low_ms=ms - 1, p50_high_ms=ms + 1) for ms in (105.5, 107.0))
    assert a.agrees_with(b)
    assert b.agrees_with(a)
    assert not a.agrees_with(b, drift_allowance=0.0)
    assert not a.agrees_with(far)
    assert not far.agrees_with(a)
    assert far.agrees_with(row("model", 1, 1.0, p50_low_ms=0.0, p50_high_ms=float("inf")))


def run(rng: np.random.Generator, drift: float) -> TimingRow:
    """A run of 25 rounds of 8, all of them slower or faster by a share that is drawn once."""
    times = np.exp(drift * rng.standard_normal()) * np.exp(0.02 * rng.standard_normal((25, 8)))
    call = TimedCall(lambda: None)
    call.rounds = [[Reading(ms, float("nan")) for ms in readings] for readings in times.tolist()]
    return row_of(1, RowKey("model"), [call], [None], None)


def apart(drift: float, allowance: float | None = None) -> int:
    """Pairs of 200 that differ by more than their intervals and the allowance."""
    rng = np.random.default_rng(0)
    pairs = [(run(rng, drift), run(rng, drift)) for _ in range(200)]
    return sum(not (a.agrees_with(b) if allowance is None else a.agrees_with(b, allowance)) for a, b in pairs)


def test_runs_with_drift_agree_within_intervals_and_allowance_in_95_of_100_trials() -> None:
    assert apart(drift=0.0, allowance=0.0) <= 10
    # the sampling intervals do not cover drift, for which there is the allowance
    assert apart(drift=0.015, allowance=0.0) > 40
    assert apart(drift=0.015) <= 10


def test_the_interval_is_that_of_the_sampling_alone() -> None:
    call = TimedCall(lambda: None)
    call.rounds = [[Reading(2.0, float("nan"))]] * 50
    row = row_of(1, RowKey("model"), [call], [FlopCount(4000)], 1e6)
    assert (row.p50_low_ms, row.p50_ms, row.p50_high_ms) == (2.0, 2.0, 2.0)
    assert row.peak_share == pytest.approx(2.0)
    least = row_of(1, RowKey("model"), [call], [FlopCount(4000, is_complete=False)], 1e6)
    assert (least.flops, least.flops_complete, least.peak_share) == (4000, False, None)

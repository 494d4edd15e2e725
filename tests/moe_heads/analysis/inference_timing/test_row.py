"""Two runs of one model, by simulation: of what varies within a run, and of what stays the same within it."""

import numpy as np
import pytest

from moe_heads.analysis.inference_timing.clock import Sample
from moe_heads.analysis.inference_timing.rounds import Contender
from moe_heads.analysis.inference_timing.row import Flops, Key, TimingRow, row_of


def run(rng: np.random.Generator, drift: float) -> TimingRow:
    """A run of 25 rounds of 8, all of them slower or faster by a share that is drawn once."""
    times = np.exp(drift * rng.standard_normal()) * np.exp(0.02 * rng.standard_normal((25, 8)))
    contender = Contender(lambda: None)
    contender.rounds = [[Sample(ms, float("nan")) for ms in found] for found in times.tolist()]
    return row_of(1, Key("model"), contender, None, None)


def apart(drift: float, allowance: float | None = None) -> int:
    """Pairs of 200 that differ by more than their intervals and the allowance."""
    rng = np.random.default_rng(0)
    pairs = [(run(rng, drift), run(rng, drift)) for _ in range(200)]
    return sum(not (a.agrees_with(b) if allowance is None else a.agrees_with(b, allowance)) for a, b in pairs)


def test_two_runs_differ_by_no_more_than_intervals_and_allowance_in_95_of_100_trials() -> None:
    assert apart(drift=0.0, allowance=0.0) <= 10
    # what the intervals of the sampling cannot know is what the allowance is for
    assert apart(drift=0.015, allowance=0.0) > 40
    assert apart(drift=0.015) <= 10


def test_the_interval_is_that_of_the_sampling_alone() -> None:
    contender = Contender(lambda: None)
    contender.rounds = [[Sample(2.0, float("nan"))]] * 50
    row = row_of(1, Key("model"), contender, Flops(4000), 1e6)
    assert (row.p50_low_ms, row.p50_ms, row.p50_high_ms) == (2.0, 2.0, 2.0)
    assert row.peak_share == pytest.approx(2.0)
    least = row_of(1, Key("model"), contender, Flops(4000, is_complete=False), 1e6)
    assert (least.flops, least.flops_complete, least.peak_share) == (4000, False, None)

"""Statistics of several draws of a batch size: the spread between the draws apart from the noise within a draw."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_heads.analysis.inference_timing.statistics import DRIFT, Rounds, bootstrap, median_interval, paired

__all__ = ["DrawSpread", "DrawnRounds", "bootstrap_draws", "interval_of", "median_of", "quantiles_of", "spread_of"]

DrawnRounds = Sequence[Rounds]
"""Rounds of one module, by draw. The draws run in the same rounds."""

_NORMAL = 1.96
_PERMUTATIONS = 999
_SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class DrawSpread:
    """Spread of the time over draws, and the noise of one draw.

    Attributes:
        medians: Median of each draw, ms.
        between_ms: Standard deviation of the draws, without the part that the noise explains.
        within_ms: Standard error of the median of one draw: its noise.
        is_significant: Whether the draws differ: by more than the allowance for drift, and more than a permutation of
            the draws within the rounds gives (5 % level).
    """

    medians: tuple[float, ...]
    between_ms: float
    within_ms: float
    is_significant: bool


def median_of(draws: DrawnRounds) -> float:
    """Return the median over the draws of their medians."""
    return float(np.median(_medians(draws)))


def interval_of(draws: DrawnRounds, seed: int) -> tuple[float, float]:
    """Return the 95 % sampling interval of `median_of` for these draws: it contains the noise only."""
    if len(draws) == 1:
        return median_interval(draws[0])
    median = median_of(draws)
    _, low, high = bootstrap(_over_draws, draws, seed)
    return max(min(low, median), 0.0), max(high, median)


def bootstrap_draws(
    statistic: Callable[..., Any], modules: Sequence[DrawnRounds], seed: int
) -> tuple[float, float, float]:
    """Apply `bootstrap` to a function of one median per module, each over the same draws."""
    num_draws = len(modules[0])

    def of_medians(*medians: Any) -> Any:
        parts = [medians[start : start + num_draws] for start in range(0, len(medians), num_draws)]
        return statistic(*(_over_draws(*part) for part in parts))

    return bootstrap(of_medians, [rounds for draws in modules for rounds in draws], seed)


def quantiles_of(draws: DrawnRounds, levels: Sequence[float]) -> list[float]:
    """Return quantiles over all runs, in which each draw has the same weight, whatever its number of runs."""
    times = [_runs(rounds) for rounds in draws]
    if len(times) == 1:
        found: list[float] = np.quantile(times[0], levels).tolist()
        return found
    values = np.concatenate(times)
    weights = np.concatenate([np.full(len(part), 1 / len(part)) for part in times])
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / len(times)
    # the smallest run that the share of runs reaches
    places = np.searchsorted(reached, np.asarray(levels) - 1e-12).clip(max=len(values) - 1)
    return [float(values[order][place]) for place in places]


def spread_of(draws: DrawnRounds, seed: int) -> DrawSpread | None:
    """Return the spread over draws; None for a single draw."""
    if len(draws) < 2:
        return None
    medians = _medians(draws)
    errors = [(high - low) / (2 * _NORMAL) for low, high in map(median_interval, draws)]
    within = math.sqrt(float(np.mean(np.square(errors))))
    excess = float(np.var(medians, ddof=1)) - within**2
    between = math.nan if math.isinf(within) else math.sqrt(max(excess, 0.0))
    is_large = float(np.ptp(medians)) > 2 * DRIFT * float(np.median(medians))
    is_significant = is_large and _permutation_level(draws, seed) <= _SIGNIFICANCE
    return DrawSpread(tuple(medians.tolist()), between, within, is_significant)


def _permutation_level(draws: DrawnRounds, seed: int) -> float:
    """Return the share of permutations of the draws within each round whose mean ranks vary at least as observed.

    Without a difference between the draws, their turns within a round are exchangeable, so that the level is exact.
    This is the test of Friedman, which a round that is slow as a whole does not affect.
    """
    from scipy import stats

    turns = np.array([[float(np.median(turn)) for turn in rounds] for rounds in paired(draws)]).T
    rng = np.random.default_rng(seed)
    ranks = stats.rankdata(turns, axis=1)
    observed = float(np.var(ranks.mean(0)))
    shuffled = rng.permuted(np.repeat(ranks[None], _PERMUTATIONS, axis=0), axis=2)
    # sums in another order may round otherwise
    found = np.var(shuffled.mean(1), axis=1) * (1 + 1e-9)
    return (1 + int(np.sum(found >= observed))) / (1 + _PERMUTATIONS)


def _over_draws(*medians: Any) -> Any:
    return medians[0] if len(medians) == 1 else np.median(np.stack(np.broadcast_arrays(*medians)), axis=0)


def _medians(draws: DrawnRounds) -> NDArray[np.float64]:
    return np.array([np.median(_runs(rounds)) for rounds in draws])


def _runs(rounds: Rounds) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(turn, float) for turn in rounds])

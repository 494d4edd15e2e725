"""Confidence intervals of medians of dependent runs: batch means, and a block bootstrap over rounds."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DRIFT", "Rounds", "bootstrap", "median_interval", "paired"]

Rounds = Sequence[Sequence[float]]
"""Times of one module in order: one list per round, a short period in which the module ran one or several times."""

DRIFT = 0.02
"""Relative allowance for effects that are constant within a run but differ between runs, such as memory placement.

This is a choice and not a statistic, and no interval contains it. It was set from pairs of runs on one machine and may
not fit another machine.
"""

_CONFIDENCE = 0.95

# Ten blocks detect disturbances that last a tenth of the time, five blocks detect longer ones. In the simulation of
# test_statistics.py, either number alone lets too many pairs of runs differ.
_NUM_BLOCKS = (10, 5)
_RESAMPLES = 1000
_FEWEST_ROUNDS = 6


def median_interval(rounds: Rounds) -> tuple[float, float]:
    r"""Return the 95 % confidence interval of the median of consecutive runs on a shared machine.

    The interval assumes no distribution. Its ends are the order statistics of rank :math:`n(1/2 \mp h)`. For
    independent runs, h follows from the binomial distribution. A slow phase of the machine lasts for many runs, so h is
    the largest of that value and of the batch means of :math:`1[t_i \le \text{median}]`: half the width of Student's
    interval for their mean, over ten and over five blocks of consecutive rounds. Fewer than six runs give the interval
    from zero to infinity.

    Args:
        rounds: The times.

    Returns:
        Lower and upper end, in the unit of the times.

    Source:
        Heidelberger and Lewis, Quantile estimation in dependent sequences, Operations Research 32, 1984.

    Example:
        >>> from moe_heads.analysis.inference_timing.statistics import median_interval
        >>> median_interval([[float(time)] for time in range(100)])[0] < 49.5
        True
    """
    from scipy import stats

    times = np.sort(np.concatenate([np.asarray(times, float) for times in rounds]))
    num_runs = len(times)
    # the r-th smallest and the r-th largest run enclose the median except with probability 2 P(Binomial(n, 1/2) < r)
    rank = int(stats.binom.ppf((1 - _CONFIDENCE) / 2, num_runs, 0.5))
    if rank < 1 or stats.binom.cdf(rank - 1, num_runs, 0.5) > (1 - _CONFIDENCE) / 2:
        return 0.0, float("inf")
    halves = [_batch_means(rounds, float(np.median(times)), num_blocks) for num_blocks in _NUM_BLOCKS]
    rank = max(1, min(rank, int(np.floor(num_runs * (0.5 - max(halves))))))
    return float(times[rank - 1]), float(times[num_runs - rank])


def bootstrap(statistic: Callable[..., Any], modules: Sequence[Rounds], seed: int) -> tuple[float, float, float]:
    """Estimate a function of the medians of modules that ran in the same rounds, with its 95 % confidence interval.

    Up to ten blocks of consecutive rounds are drawn with replacement, the same blocks for all modules, so that a slow
    phase of the machine cancels in a ratio. The ends are percentiles of the function over 1,000 draws, extended to
    contain the value. With fewer than six rounds, the interval is from minus infinity to infinity.

    Args:
        statistic: Elementwise function of one median, or one array of medians, per module.
        modules: The times of each module.
        seed: Seed of the draws.

    Returns:
        The value, and the lower and upper end of its interval.
    """
    modules = paired(modules)
    value = float(statistic(*(float(np.median(np.concatenate(rounds))) for rounds in modules)))
    num_rounds = len(modules[0])
    if num_rounds < _FEWEST_ROUNDS:
        return value, -float("inf"), float("inf")
    num_blocks = min(num_rounds, _NUM_BLOCKS[0])
    draws = np.random.default_rng(seed).integers(num_blocks, size=(_RESAMPLES, num_blocks))
    # how often each block was drawn
    counts = np.stack([(draws == block).sum(1) for block in range(num_blocks)], axis=1)
    medians = [_weighted_medians(_blocks(rounds, num_blocks), counts) for rounds in modules]
    low, high = np.quantile(statistic(*medians), [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return value, min(value, float(low)), max(value, float(high))


def paired(modules: Sequence[Rounds]) -> list[Rounds]:
    """Return the rounds in which all modules ran: a module that has all its runs leaves the later rounds."""
    num_rounds = min(map(len, modules))
    return [rounds[:num_rounds] for rounds in modules]


def _weighted_medians(blocks: list[list[NDArray[np.float64]]], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the lower median of the runs for each row of ``counts``, which holds the multiplicity of each block."""
    runs = [np.concatenate(block) for block in blocks]
    times, owners = np.concatenate(runs), np.repeat(np.arange(len(runs)), [len(times) for times in runs])
    order = np.argsort(times)
    cumulative = counts[:, owners[order]].cumsum(1)
    medians: NDArray[np.float64] = times[order][(2 * cumulative >= cumulative[:, -1:]).argmax(1)]
    return medians


def _batch_means(rounds: Rounds, median: float, num_blocks: int) -> float:
    """Return half the width of Student's interval for the fraction of runs below the median, over blocks of rounds."""
    from scipy import stats

    below = [float(np.mean(np.concatenate(block) <= median)) for block in _blocks(rounds, num_blocks)]
    if len(below) < 2:
        return 0.0
    quantile = stats.t.ppf((1 + _CONFIDENCE) / 2, len(below) - 1)
    return float(quantile * np.std(below, ddof=1) / np.sqrt(len(below)))


def _blocks(rounds: Rounds, num_blocks: int) -> list[list[NDArray[np.float64]]]:
    """Divide the rounds into consecutive blocks of nearly equal length."""
    arrays = [np.asarray(times, float) for times in rounds]
    edges = np.linspace(0, len(arrays), min(len(arrays), num_blocks) + 1).round().astype(int)
    return [arrays[start:stop] for start, stop in itertools.pairwise(edges)]

"""How sure a median is, of runs that are not independent: intervals by batch means and by a block bootstrap."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["CONFIDENCE", "DRIFT", "Floats", "Rounds", "bootstrap_interval", "containing", "median_interval", "paired"]

Floats = NDArray[np.float64]

Rounds = Sequence[Sequence[float]]
"""Times of one module, in order: a list a round, which is a short while in which it ran several times."""

CONFIDENCE = 0.95

DRIFT = 0.02
"""Allowance, relative to a median, for what stays the same within a run and differs in the next, such as where its
tensors lie. No statistic, and in no interval: it was chosen on one machine from pairs of runs, and may not fit another.
"""

# Ten blocks notice the disturbances that last for a tenth of the time, five those that last longer; simulated in
# tests/moe_heads/analysis/inference_timing/test_intervals.py, either alone lets too many pairs of runs differ.
_NUM_BLOCKS = (10, 5)
_RESAMPLES = 1000
_FEWEST_ROUNDS = 6


def median_interval(rounds: Rounds) -> tuple[float, float]:
    r"""Confidence interval (95 %) of the median of runs that follow each other on a machine that others use too.

    Without any assumption on the distribution: its ends are the order statistics of rank :math:`n(1/2 \mp h)`. For
    independent runs h follows from the binomial distribution. Here a slow phase of the machine lasts for many runs, so
    h is the largest of that and of the batch means of :math:`1[t_i \le \text{median}]`: half the width of Student's
    interval for their mean, over ten and over five blocks of consecutive rounds. Runs too few for the level, fewer than
    six, give the interval from zero to infinity.

    Args:
        rounds: The times.

    Returns:
        Lower and upper end, in the unit of the times.

    Source:
        Heidelberger and Lewis, Quantile estimation in dependent sequences, Operations Research 32, 1984.

    Example:
        >>> from moe_heads.analysis.inference_timing.intervals import median_interval
        >>> median_interval([[float(time)] for time in range(100)])[0] < 49.5
        True
    """
    from scipy import stats

    times = np.sort(np.concatenate([np.asarray(found, float) for found in rounds]))
    num_runs = len(times)
    # the r-th smallest and the r-th largest run enclose the median but for twice P(Binomial(n, 1/2) < r)
    rank = int(stats.binom.ppf((1 - CONFIDENCE) / 2, num_runs, 0.5))
    if rank < 1 or stats.binom.cdf(rank - 1, num_runs, 0.5) > (1 - CONFIDENCE) / 2:
        return 0.0, float("inf")
    halves = [_batch_means(rounds, float(np.median(times)), num_blocks) for num_blocks in _NUM_BLOCKS]
    rank = max(1, min(rank, int(np.floor(num_runs * (0.5 - max(halves))))))
    return float(times[rank - 1]), float(times[num_runs - rank])


def bootstrap_interval(statistic: Callable[..., Floats], modules: Sequence[Rounds], seed: int) -> tuple[float, float]:
    """Confidence interval (95 %) of a function of the medians of several modules that took turns in the same rounds.

    A block bootstrap: up to ten blocks of consecutive rounds are drawn with repetition, the same for all modules, so
    that what slowed them all at once cancels in a ratio; the ends are percentiles of the function over 1,000 draws.
    With fewer than six rounds the blocks say too little, and the interval is from minus infinity to infinity.

    Args:
        statistic: Function of as many arrays of medians as there are modules, elementwise.
        modules: The times of each module.
        seed: Seed of the draws.

    Returns:
        Lower and upper end.
    """
    modules = paired(modules)
    num_rounds = len(modules[0])
    if num_rounds < _FEWEST_ROUNDS:
        return -float("inf"), float("inf")
    num_blocks = min(num_rounds, _NUM_BLOCKS[0])
    draws = np.random.default_rng(seed).integers(num_blocks, size=(_RESAMPLES, num_blocks))
    # how often each block was drawn
    counts = np.stack([(draws == block).sum(1) for block in range(num_blocks)], axis=1)
    medians = [_weighted_medians(_blocks(rounds, num_blocks), counts) for rounds in modules]
    low, high = np.quantile(statistic(*medians), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def paired(modules: Sequence[Rounds]) -> list[Rounds]:
    """The rounds that all modules took part in: a module that has its runs rests while others go on."""
    num_rounds = min(map(len, modules))
    return [rounds[:num_rounds] for rounds in modules]


def containing(value: float, ends: tuple[float, float]) -> tuple[float, float]:
    """An interval that contains its value: percentiles of a bootstrap need not enclose it."""
    return min(value, ends[0]), max(value, ends[1])


def _weighted_medians(blocks: list[list[Floats]], counts: NDArray[np.int64]) -> Floats:
    """The (lower) median of the runs of all blocks, each block as often as a line of ``counts`` says: one a line."""
    runs = [np.concatenate(block) for block in blocks]
    times, owners = np.concatenate(runs), np.repeat(np.arange(len(runs)), [len(found) for found in runs])
    order = np.argsort(times)
    cumulative = counts[:, owners[order]].cumsum(1)
    medians: Floats = times[order][(2 * cumulative >= cumulative[:, -1:]).argmax(1)]
    return medians


def _batch_means(rounds: Rounds, median: float, num_blocks: int) -> float:
    """Half the width of Student's interval for the share of runs below the median, over blocks of rounds."""
    from scipy import stats

    below = [float(np.mean(np.concatenate(block) <= median)) for block in _blocks(rounds, num_blocks)]
    if len(below) < 2:
        return 0.0
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(below) - 1)
    return float(quantile * np.std(below, ddof=1) / np.sqrt(len(below)))


def _blocks(rounds: Rounds, num_blocks: int) -> list[list[Floats]]:
    """Blocks of consecutive rounds, as even as can be."""
    arrays = [np.asarray(found, float) for found in rounds]
    edges = np.linspace(0, len(arrays), min(len(arrays), num_blocks) + 1).round().astype(int)
    return [arrays[start:stop] for start, stop in itertools.pairwise(edges)]

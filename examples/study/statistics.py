"""Statistics over seeds with scipy: intervals, paired comparisons, rank correlations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from study.quantities import Quantity
from study.results import Run

CONFIDENCE = 0.95
_ALIKE_CONFIDENCE = 2 * CONFIDENCE - 1  # of the interval that corresponds to two one-sided tests

Values = npt.NDArray[Any]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with Student's interval, which a single seed lacks.

    Attributes:
        mean: Mean, the geometric one for a ratio.
        low: Lower end of the 95 % interval, or None.
        high: Upper end.
        num_seeds: Number of seeds with a value.
    """

    mean: float
    low: float | None
    high: float | None
    num_seeds: int

    def format(self, pattern: str = ".3g", scale: float = 1.0) -> str:
        """Format as ``mean [low, high]``."""
        mean = format(scale * self.mean, pattern)
        if self.low is None or self.high is None:
            return mean
        return f"{mean} [{format(scale * self.low, pattern)}, {format(scale * self.high, pattern)}]"


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two heads over their common seeds; the difference of a ratio is a factor.

    Attributes:
        quantity: The compared quantity.
        head: The head.
        baseline: The head that it is compared with.
        difference: Mean difference, or the factor, with its interval.
        effect_size: Mean of the paired differences divided by their standard deviation (Cohen's d_z), with Hedges'
            correction for few values; None for fewer than three seeds, or without any spread.
        p_value: p-value of the paired t-test; None for fewer than two seeds.
        adjusted_p_value: The p-value corrected for all tests that decide a claim (Benjamini and Yekutieli); None for
            other tests.
        differences: Differences of the seeds; logarithms for a ratio.
    """

    quantity: Quantity
    head: str
    baseline: str
    difference: Estimate
    effect_size: float | None
    p_value: float | None
    differences: tuple[float, ...]
    adjusted_p_value: float | None = None

    @property
    def sign(self) -> int:
        """1 or -1 if the head is significantly above or below the baseline after the correction, else 0."""
        if self.adjusted_p_value is None or not self.adjusted_p_value < 1 - CONFIDENCE:
            return 0
        return 1 if np.mean(self.differences) > 0 else -1

    @property
    def narrow(self) -> tuple[float, float] | None:
        """The 90 % interval of the difference or factor, which decides equivalence."""
        ends = self._ends(_ALIKE_CONFIDENCE)
        return (math.exp(ends[0]), math.exp(ends[1])) if ends is not None and self.quantity.is_ratio else ends

    @property
    def is_wholly_above(self) -> bool:
        """True if the 95 % interval, without correction, lies above no difference."""
        ends = self._ends(CONFIDENCE)
        return ends is not None and ends[0] > 0

    def is_within(self, margin: float) -> bool:
        """Return whether the heads are equivalent: the 90 % interval lies within ±margin (two one-sided tests at 5 %).

        Args:
            margin: Largest irrelevant difference; a factor above 1 for a ratio.
        """
        ends = self._ends(_ALIKE_CONFIDENCE)
        limit = math.log(margin) if self.quantity.is_ratio else margin
        return ends is not None and -limit < ends[0] and ends[1] < limit

    def is_beyond(self, margin: float) -> bool:
        """Return whether the heads differ by more than the margin: the 95 % interval lies outside ±margin."""
        ends = self._ends(CONFIDENCE)
        limit = math.log(margin) if self.quantity.is_ratio else margin
        return ends is not None and (ends[0] > limit or ends[1] < -limit)

    def _ends(self, confidence: float) -> tuple[float, float] | None:
        return student_interval(self.differences, confidence)


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation over all runs, with an interval that resamples seeds.

    Attributes:
        quantity: The quantity that is correlated with the generalization gap.
        rho: The correlation.
        low: Lower end of the 95 % percentile interval; None for fewer than three seeds.
        high: Upper end.
        num_runs: Number of runs with both numbers.
        within_heads: The correlation after subtracting each head's mean, which removes differences between heads.
    """

    quantity: Quantity
    rho: float
    low: float | None
    high: float | None
    num_runs: int
    within_heads: float


def values_of(runs: Sequence[Run], quantity: Quantity, head: str) -> dict[int, float]:
    """Return the existing values of a head's quantity by seed."""
    found = {run["seed"]: quantity.of(run) for run in runs if run["head"] == head}
    return {seed: value for seed, value in found.items() if value is not None}


def estimate(values: Sequence[float], is_ratio: bool = False) -> Estimate | None:
    """Return mean and interval, None without values."""
    if not values:
        return None
    data = np.log(values) if is_ratio else np.asarray(values)
    back = np.exp if is_ratio else float
    ends = student_interval(data)
    low, high = (None, None) if ends is None else (float(back(end)) for end in ends)
    return Estimate(float(back(data.mean())), low, high, len(values))


def student_interval(data: Sequence[float] | Values, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Return Student's interval of the mean, None for fewer than two values."""
    if len(data) < 2:
        return None
    spread = float(stats.sem(data))
    if spread == 0:
        return float(data[0]), float(data[0])
    low, high = stats.t.interval(confidence, len(data) - 1, loc=float(np.mean(data)), scale=spread)
    return float(low), float(high)


def compare(runs: Sequence[Run], quantity: Quantity, head: str, baseline: str) -> Comparison | None:
    """Compare two heads paired by seed; return None without a common seed, or if a run is censored."""
    if quantity.is_censored and any(quantity.of(run) is None for run in runs if run["head"] in (head, baseline)):
        return None
    first, second = values_of(runs, quantity, head), values_of(runs, quantity, baseline)
    seeds = sorted(set(first) & set(second))
    if not seeds:
        return None
    ours, theirs = (np.array([values[seed] for seed in seeds]) for values in (first, second))
    if quantity.is_ratio:
        ours, theirs = np.log(ours), np.log(theirs)
    differences = ours - theirs
    found = estimate(np.exp(differences).tolist() if quantity.is_ratio else differences.tolist(), quantity.is_ratio)
    assert found is not None
    spread = differences.std(ddof=1) if len(seeds) > 1 else 0.0
    # if all seeds have the same difference, the only spread is rounding, and there is no test
    is_spread = spread > 1e-9 * float(np.abs(np.concatenate([ours, theirs])).max())
    p_value = float(stats.ttest_rel(ours, theirs).pvalue) if is_spread else None
    return Comparison(
        quantity, head, baseline, found, _hedges(differences, spread), p_value, tuple(map(float, differences))
    )


def adjusted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons with p-values corrected for their number.

    The method of Benjamini and Yekutieli is valid for dependent tests: all heads share the seeds, and λmax and trace
    share a Hessian.
    """
    tested = [c.p_value for c in comparisons if c.p_value is not None]
    corrected = iter(stats.false_discovery_control(tested, method="by") if tested else [])
    return [c if c.p_value is None else replace(c, adjusted_p_value=float(next(corrected))) for c in comparisons]


def correlate(runs: Sequence[Run], quantity: Quantity, gap: Quantity, num_resamples: int = 2000) -> Correlation | None:
    """Correlate a quantity with the generalization gap; return None for fewer than four runs or a constant quantity."""
    if quantity.is_censored and any(quantity.of(run) is None for run in runs):
        return None
    both = [(run["head"], run["seed"], quantity.of(run), gap.of(run)) for run in runs]
    rows = [(head, seed, x, y) for head, seed, x, y in both if x is not None and y is not None]
    if len(rows) < 4:
        return None
    heads, seeds = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    x = np.log([row[2] for row in rows]) if quantity.is_ratio else np.array([row[2] for row in rows])
    y = np.array([row[3] for row in rows])
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    low, high = _resampled_by_seed(x, y, seeds, num_resamples)
    within = _spearman(_centered(x, heads), _centered(y, heads))
    return Correlation(quantity, _spearman(x, y), low, high, len(rows), within)


def _resampled_by_seed(x: Values, y: Values, seeds: Values, times: int) -> tuple[float | None, float | None]:
    """Return the percentile interval of the rank correlation over resampled seeds; runs of a seed are dependent."""
    known = np.unique(seeds)
    if len(known) < 3:
        return None, None
    rows = {seed: np.flatnonzero(seeds == seed) for seed in known}

    rng = np.random.default_rng(0)
    found = []
    for _ in range(times):
        index = np.concatenate([rows[seed] for seed in rng.choice(known, len(known))])
        found.append(_spearman(x[index], y[index]))
    # a resample of one head with one seed has no ranks to compare
    low, high = np.nanpercentile(found, [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _centered(values: Values, groups: Values) -> Values:
    centered = values.astype(float).copy()
    for group in np.unique(groups):
        centered[groups == group] -= values[groups == group].mean()
    return centered


def _spearman(x: Values, y: Values) -> float:
    return float("nan") if np.ptp(x) == 0 or np.ptp(y) == 0 else float(stats.spearmanr(x, y).statistic)


def _hedges(differences: Values, spread: float) -> float | None:
    degrees = len(differences) - 1
    if degrees < 2 or spread == 0:
        return None
    # the exact bias of d for few values (Hedges 1981)
    correction = math.exp(math.lgamma(degrees / 2) - math.lgamma((degrees - 1) / 2)) / math.sqrt(degrees / 2)
    return float(correction * differences.mean() / spread)

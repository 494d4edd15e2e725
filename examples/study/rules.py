"""Statements about runs, the rules that decide them, and the verdict on a claim.

Statements that compare heads are paired by seed. `is_above` tests that one head is above another, `are_alike` that two
are equivalent within a margin, and `is_different` that they differ by more than a margin.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from study import quantities as q
from study.quantities import Quantity
from study.results import Run
from study.statistics import Comparison, estimate, values_of

Pair = tuple[str, str]
"""Names of a head and of the head that it is compared with."""

Rule = Callable[[Comparison], "Statement"]
"""A test of a comparison of two heads."""


@dataclass(frozen=True)
class Statement:
    """A part of a claim.

    Attributes:
        text: The measured numbers.
        is_true: True if supported, False if contradicted, None if undecided.
        num_seeds: Number of seeds with data.
    """

    text: str
    is_true: bool | None
    num_seeds: int


@dataclass(frozen=True)
class Verdict:
    """A claim with its statements and the outcome.

    Attributes:
        number: Number of the claim in the report, 1 … 6.
        name: Name of the claim's function in `study.claims`.
        claim: Text of the claim.
        statements: Parts of the claim.
        figure: Name of the figure for the claim.
    """

    number: int
    name: str
    claim: str
    statements: tuple[Statement, ...]
    figure: str

    @property
    def outcome(self) -> str:
        """The outcome: "Supported", "Not supported", or "Undecided with n seeds"."""
        found = [statement.is_true for statement in self.statements]
        if False in found:
            return "Not supported"
        if found and all(found):
            return "Supported"
        num_seeds = min(statement.num_seeds for statement in self.statements)
        return f"Undecided with {num_seeds} seed{'s' if num_seeds != 1 else ''}"


@dataclass(frozen=True)
class Evidence:
    """The runs of a study and the comparisons of their heads.

    Attributes:
        runs: All runs.
        comparisons: Comparisons by quantity, head and baseline.
    """

    runs: Sequence[Run]
    comparisons: Mapping[tuple[Quantity, str, str], Comparison]

    def test(self, quantity: Quantity, rule: Rule, pairs: Sequence[Pair]) -> tuple[Statement, ...]:
        """Apply a rule to the comparison of each pair of heads in a quantity."""
        return tuple(
            rule(self.comparisons[quantity, *pair])
            if (quantity, *pair) in self.comparisons
            else Statement(f"{quantity.title}: not measured for both {pair[0]} and {pair[1]}", None, 0)
            for pair in pairs
        )


def is_above(margin: float) -> Rule:
    """Return a test that the head is above the baseline.

    It is contradicted by a significantly lower head, and by equivalence within the margin.
    """

    def rule(c: Comparison) -> Statement:
        is_contradicted = c.sign < 0 or (c.sign == 0 and c.is_within(margin) and not c.is_wholly_above)
        is_true = True if c.sign > 0 else False if is_contradicted else None
        return _statement(c, is_true, f"; no difference means {_margin(c, margin)}")

    return rule


def are_alike(margin: float) -> Rule:
    """Return a test that the two heads are equivalent within the margin."""

    def rule(c: Comparison) -> Statement:
        is_true = True if c.is_within(margin) else False if c.is_beyond(margin) else None
        return _statement(replace(c, adjusted_p_value=None), is_true, f"; equivalent means {_margin(c, margin)}")

    return rule


def is_different(evidence: Evidence, quantities: Sequence[Quantity], pair: Pair, margin: float) -> Statement:
    """Test that two heads differ by more than the margin in at least one of several quantities."""
    comparisons = [evidence.comparisons.get((quantity, *pair)) for quantity in quantities]
    found = [c for c in comparisons if c is not None]
    if not found:
        return Statement(f"{pair[0]} and {pair[1]}: no line measured for both", None, 0)
    text = "; ".join(_statement(c, None).text for c in found) + f"; equivalent means {_margin(found[0], margin)}"
    are_all_alike = len(found) == len(comparisons) and all(c.is_within(margin) for c in found)
    differs = any(c.is_beyond(margin) for c in found)
    num_seeds = min(c.difference.num_seeds for c in found)
    return Statement(text, True if differs else False if are_all_alike else None, num_seeds)


def is_balanced(evidence: Evidence, head: str, fair_share: float) -> Statement:
    """Test that the least-used expert has more than a fraction of its fair share, on average and in every run."""
    values = list(values_of(evidence.runs, q.BALANCE, head).values())
    found = estimate(values)
    if found is None:
        return Statement(f"{head}: no expert load measured", None, 0)
    text = (
        f"{head}: the least-used expert has {found.format('.2f')} of its fair share, {min(values):.2f} in the worst of"
        f" {len(values)} runs; collapse means below {fair_share:g}"
    )
    if min(values) < fair_share:
        return Statement(text, False, len(values))
    return Statement(text, True if found.low is not None and found.low > fair_share else None, len(values))


def is_not_faster(evidence: Evidence, head: str, margin: float) -> Statement:
    """Test that the speed-up of the whole model over the dense head is below the margin."""
    model = estimate(list(values_of(evidence.runs, q.SPEEDUP, head).values()), is_ratio=True)
    alone = estimate(list(values_of(evidence.runs, q.HEAD_SPEEDUP, head).values()), is_ratio=True)
    if model is None:
        return Statement(f"{head}: no inference time measured", None, 0)
    text = f"{head}: the speed of the model is {model.format('.4f')} times that with the dense head of equal capacity"
    if alone is not None:
        text += f", the speed of the head alone {alone.format('.2f')} times"
    text += f"; a speed-up means above {margin:g}"
    if model.low is None or model.high is None:
        return Statement(text, None, model.num_seeds)
    is_true = True if model.high < margin else False if model.low > margin else None
    return Statement(text, is_true, model.num_seeds)


def _statement(c: Comparison, is_true: bool | None, suffix: str = "") -> Statement:
    sign = "/" if c.quantity.is_ratio else "−"
    pattern, scale = ".3f" if c.quantity.is_ratio else "+.3g", c.quantity.scale
    numbers = c.difference.format(pattern, scale)
    if c.narrow is not None:
        low, high = (format(scale * end, pattern) for end in c.narrow)
        numbers += f" (90 %: [{low}, {high}])"
    p_value = "" if c.adjusted_p_value is None else f", p = {c.adjusted_p_value:.2g}"
    text = f"{c.quantity.title}: {c.head} {sign} {c.baseline} = {numbers}{p_value}{suffix}"
    return Statement(text, is_true, c.difference.num_seeds)


def _margin(c: Comparison, margin: float) -> str:
    return f"within a factor {margin:g}" if c.quantity.is_ratio else f"within ±{c.quantity.scale * margin:g}"

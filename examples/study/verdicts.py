"""The six claims of arXiv 2601.15021, each decided by code from the runs.

A claim is a conjunction of statements, each held up, refuted, or open with the seeds that there are. Three kinds of
statements compare heads, paired by seed: that one is *above* another, that two are *alike*, that they are *different*.
`RULES` says to the readers of the report what decides each. The correction of the tests of "above" may leave a claim
open; it is no evidence against it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from study import quantities as q
from study.quantities import Quantity
from study.results import Run
from study.statistics import Comparison, adjusted, compare, estimate, values_of

# Below these a difference does not matter; the report states them.
SLIGHT_ACCURACY_MARGIN = 0.001
ACCURACY_MARGIN = 0.005
GAP_MARGIN = 0.05
SHARPNESS_MARGIN = 1.25
SPEED_MARGIN = 1.05
FAIR_SHARE = 0.25

MOE_HEADS = ("soft", "sparse")

RULES = f"""\
A claim is a conjunction of the statements below it: it holds when all are held up, does not hold when one is refuted,
and cannot be decided otherwise. That a head is *above* another is held up by a corrected test at 5 %; it is refuted
by one the other way, or where the 90 % interval lies within the margin ("none is") and the 95 % interval does not lie
above. That two are *alike* is held up where the 90 % interval lies within the margin (two one-sided tests at 5 %),
and refuted where the 95 % interval lies outside. Claim 5 is held up where either of its two quantities lies outside
with its 95 % interval, and refuted where both are alike. Claim 2 is held up where in every run, and with the whole
interval of the mean, the least used expert has more than {FAIR_SHARE:g} of its fair share 1/E; that regularization is
the cause is not tested, as every head was trained with it. Claim 6 is held up where the whole interval lies below
{SPEED_MARGIN:g}. The claims are about the paper's heads, soft and sparse (k = 2); one with k = 1 (hard) decides
none."""

# What the tests of "above" are about: they are corrected together.
_ABOVE = (
    *((q.ACCURACY, head, "dense") for head in MOE_HEADS),
    *((quantity, "soft", other) for quantity in (q.LAMBDA_TRAIN, q.TRACE_TRAIN) for other in ("dense", "sparse")),
)


@dataclass(frozen=True)
class Statement:
    """A part of a claim.

    Attributes:
        text: What was found, in numbers.
        is_true: True, False, or None where it is open.
        num_seeds: Seeds behind it.
    """

    text: str
    is_true: bool | None
    num_seeds: int


@dataclass(frozen=True)
class Verdict:
    """A claim, what was found, and what follows.

    Attributes:
        number: 1 … 6.
        claim: The claim.
        statements: Its parts.
        figure: Name of the figure that shows it.
    """

    number: int
    claim: str
    statements: tuple[Statement, ...]
    figure: str

    @property
    def outcome(self) -> str:
        """In words: "holds", "does not hold", or "cannot be decided with n seeds"."""
        found = [statement.is_true for statement in self.statements]
        if False in found:
            return "does not hold"
        if found and all(found):
            return "holds"
        num_seeds = min(statement.num_seeds for statement in self.statements)
        return f"cannot be decided with {num_seeds} seed{'s' if num_seeds != 1 else ''}"


def comparisons_of(runs: Sequence[Run], heads: Sequence[str]) -> list[Comparison]:
    """Every head against the dense one, and soft against sparse; those that decide a claim with corrected p-values."""
    pairs = [(head, "dense") for head in heads if head != "dense" and "dense" in heads]
    pairs += [("soft", "sparse")] if {"soft", "sparse"} <= set(heads) else []
    wanted = [(quantity, *pair) for quantity in q.QUANTITIES if quantity.is_compared for pair in pairs]
    made = {which: compare(runs, *which) for which in wanted}
    found = {which: comparison for which, comparison in made.items() if comparison is not None}
    tested = [which for which in _ABOVE if which in found]
    found |= dict(zip(tested, adjusted([found[which] for which in tested]), strict=True))
    return list(found.values())


def verdicts(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[Verdict]:
    """All six."""
    known = {(c.quantity, c.head, c.baseline): c for c in comparisons}

    def each(quantity: Quantity, rule: Rule, *pairs: tuple[str, str]) -> list[Statement]:
        return [
            rule(known[quantity, *pair]) if (quantity, *pair) in known else _absent(quantity, *pair) for pair in pairs
        ]

    against_dense = [(head, "dense") for head in MOE_HEADS]
    claims = [
        (
            "Both MoE heads are slightly more accurate than Dense.",
            "accuracy",
            each(q.ACCURACY, _is_above(SLIGHT_ACCURACY_MARGIN), *against_dense),
        ),
        (
            "Balance regularization keeps the experts in even use; none collapses.",
            "utilization",
            [_balance(runs, head) for head in MOE_HEADS],
        ),
        (
            "SoftMoE is sharper than Dense and SparseMoE, which are alike (λmax and trace, training data).",
            "sharpness",
            [
                statement
                for quantity in (q.LAMBDA_TRAIN, q.TRACE_TRAIN)
                for statement in (
                    *each(quantity, _is_above(SHARPNESS_MARGIN), ("soft", "dense"), ("soft", "sparse")),
                    *each(quantity, _is_alike(SHARPNESS_MARGIN), ("sparse", "dense")),
                )
            ],
        ),
        (
            "All heads generalize alike.",
            "generalization",
            [
                *each(q.GAP, _is_alike(GAP_MARGIN), *against_dense),
                *each(q.ACCURACY, _is_alike(ACCURACY_MARGIN), *against_dense),
            ],
        ),
        (
            "Finite perturbations show qualitative differences between dense and MoE heads.",
            "landscape",
            [
                _is_other([known.get((quantity, *pair)) for quantity in (q.RISE, q.SHAPE)], *pair)
                for pair in against_dense
            ],
        ),
        (
            "Conditional routing brings no inference speed-up at this scale (whole model, batch of 256).",
            "speed",
            [_speed(runs, "sparse")],
        ),
    ]
    return [
        Verdict(number, claim, tuple(statements), figure)
        for number, (claim, figure, statements) in enumerate(claims, start=1)
    ]


Rule = Callable[[Comparison], Statement]


def _is_above(margin: float) -> Rule:
    """Refuted by less, and by an equality: an advantage that cannot be more than the margin is none."""

    def rule(c: Comparison) -> Statement:
        is_refuted = c.sign < 0 or (c.sign == 0 and c.is_within(margin) and not c.is_wholly_above)
        return _said(c, True if c.sign > 0 else False if is_refuted else None, f"; none is {_margin(c, margin)}")

    return rule


def _is_alike(margin: float) -> Rule:
    def rule(c: Comparison) -> Statement:
        found = True if c.is_within(margin) else False if c.is_beyond(margin) else None
        return _said(replace(c, adjusted_p_value=None), found, f"; alike is {_margin(c, margin)}")

    return rule


def _is_other(comparisons: Sequence[Comparison | None], head: str, baseline: str) -> Statement:
    """Whether some quantity differs by more than the margin."""
    found = [c for c in comparisons if c is not None]
    if not found:
        return Statement(f"{head} and {baseline}: no line of both", None, 0)
    text = "; ".join(_said(c, None).text for c in found) + f"; alike is {_margin(found[0], SHARPNESS_MARGIN)}"
    are_alike = len(found) == len(comparisons) and all(c.is_within(SHARPNESS_MARGIN) for c in found)
    is_other = any(c.is_beyond(SHARPNESS_MARGIN) for c in found)
    num_seeds = min(c.difference.num_seeds for c in found)
    return Statement(text, True if is_other else False if are_alike else None, num_seeds)


def _balance(runs: Sequence[Run], head: str) -> Statement:
    """Held up where the interval of the least used expert's load lies above a quarter of its share, in every run."""
    values = list(values_of(runs, q.BALANCE, head).values())
    found = estimate(values)
    if found is None:
        return Statement(f"{head}: no load was measured", None, 0)
    text = (
        f"{head}: the least used expert has {found.format('.2f')} of its fair share, {min(values):.2f} in the worst of"
        f" {len(values)} runs; collapse means below {FAIR_SHARE:g}"
    )
    if min(values) < FAIR_SHARE:
        return Statement(text, False, len(values))
    return Statement(text, True if found.low is not None and found.low > FAIR_SHARE else None, len(values))


def _speed(runs: Sequence[Run], head: str) -> Statement:
    """Held up where the speed-up of the whole model is below 5 %."""
    whole = estimate(list(values_of(runs, q.SPEEDUP, head).values()), is_ratio=True)
    alone = estimate(list(values_of(runs, q.HEAD_SPEEDUP, head).values()), is_ratio=True)
    if whole is None:
        return Statement(f"{head}: no speed was measured", None, 0)
    text = f"{head}: the model runs {whole.format('.4f')} times as fast as with the dense head of equal capacity"
    if alone is not None:
        text += f", the head by itself {alone.format('.2f')} times"
    text += f"; a speed-up means above {SPEED_MARGIN:g}"
    if whole.low is None or whole.high is None:
        return Statement(text, None, whole.num_seeds)
    is_true = True if whole.high < SPEED_MARGIN else False if whole.low > SPEED_MARGIN else None
    return Statement(text, is_true, whole.num_seeds)


def _said(c: Comparison, is_true: bool | None, more: str = "") -> Statement:
    sign = "/" if c.quantity.is_ratio else "−"
    pattern, scale = ".3f" if c.quantity.is_ratio else "+.3g", c.quantity.scale
    told = c.difference.format(pattern, scale)
    if c.narrow is not None:
        low, high = (format(scale * end, pattern) for end in c.narrow)
        told += f" (90 %: [{low}, {high}])"
    p_value = "" if c.adjusted_p_value is None else f", p = {c.adjusted_p_value:.2g}"
    text = f"{c.quantity.title}: {c.head} {sign} {c.baseline} = {told}{p_value}{more}"
    return Statement(text, is_true, c.difference.num_seeds)


def _margin(c: Comparison, margin: float) -> str:
    return f"within a factor {margin:g}" if c.quantity.is_ratio else f"within ±{c.quantity.scale * margin:g}"


def _absent(quantity: Quantity, head: str, baseline: str) -> Statement:
    return Statement(f"{quantity.title}: not measured for both {head} and {baseline}", None, 0)

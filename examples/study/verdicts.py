"""The six claims of arXiv 2601.15021, each decided by code from the runs.

A claim is a conjunction of statements about heads. A statement is held up, refuted, or open with the seeds that there
are; the claim holds when all are held up, does not hold when one is refuted, and cannot be decided otherwise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from study import quantities as q
from study.quantities import Quantity
from study.results import Run
from study.statistics import Comparison, adjusted, compare, estimate, values_of

# Below these a difference does not matter; stated in the report.
ACCURACY_MARGIN = 0.005
GAP_MARGIN = 0.05
SHARPNESS_MARGIN = 1.25
SPEED_MARGIN = 1.05
FAIR_SHARE = 0.25

MOE_HEADS = ("soft", "sparse")


@dataclass(frozen=True)
class Statement:
    """A part of a claim.

    Attributes:
        text: What was found, in numbers.
        is_true: True, False, or None where it is open.
    """

    text: str
    is_true: bool | None


@dataclass(frozen=True)
class Verdict:
    """A claim, what was found, and what follows.

    Attributes:
        number: 1 … 6.
        claim: The claim.
        statements: Its parts.
        figure: Name of the figure that shows it.
        num_seeds: Seeds of the study.
    """

    number: int
    claim: str
    statements: tuple[Statement, ...]
    figure: str
    num_seeds: int

    @property
    def outcome(self) -> str:
        """In words: "holds", "does not hold", or "cannot be decided with n seeds"."""
        found = [statement.is_true for statement in self.statements]
        if False in found:
            return "does not hold"
        if found and all(found):
            return "holds"
        return f"cannot be decided with {self.num_seeds} seed{'s' if self.num_seeds != 1 else ''}"


def comparisons_of(runs: Sequence[Run], heads: Sequence[str]) -> list[Comparison]:
    """Every head against the dense one, and soft against sparse, in every quantity; p-values corrected for all."""
    pairs = [(head, "dense") for head in heads if head != "dense" and "dense" in heads]
    pairs += [("soft", "sparse")] if {"soft", "sparse"} <= set(heads) else []
    found = [compare(runs, quantity, *pair) for quantity in q.QUANTITIES for pair in pairs]
    return adjusted([comparison for comparison in found if comparison is not None])


def verdicts(runs: Sequence[Run], comparisons: Sequence[Comparison], num_seeds: int) -> list[Verdict]:
    """All six."""
    by = {(c.quantity.key, c.head, c.baseline): c for c in comparisons}

    def each(
        quantity: Quantity, rule: Callable[[Comparison], Statement], pairs: Sequence[tuple[str, str]]
    ) -> list[Statement]:
        found = [(pair, by.get((quantity.key, *pair))) for pair in pairs]
        return [_absent(quantity, *pair) if c is None else rule(c) for pair, c in found]

    against_dense = [(head, "dense") for head in MOE_HEADS]
    claims = [
        (
            "Both MoE heads are slightly more accurate than Dense.",
            "accuracy",
            each(q.ACCURACY, _is_above, against_dense),
        ),
        (
            "Balance regularisation keeps the experts in even use; none collapses.",
            "utilisation",
            [_balance(runs, head) for head in MOE_HEADS],
        ),
        (
            "SoftMoE is sharper than Dense and SparseMoE, which are alike (λmax and trace, training data).",
            "sharpness",
            [
                statement
                for quantity in (q.LAMBDA_TRAIN, q.TRACE_TRAIN)
                for statement in (
                    *each(quantity, _is_above, [("soft", "dense"), ("soft", "sparse")]),
                    *each(quantity, _is_alike(SHARPNESS_MARGIN), [("sparse", "dense")]),
                )
            ],
        ),
        (
            "All heads generalise alike.",
            "generalisation",
            [
                *each(q.GAP, _is_alike(GAP_MARGIN), against_dense),
                *each(q.ACCURACY, _is_alike(ACCURACY_MARGIN), against_dense),
            ],
        ),
        (
            "Finite perturbations show qualitative differences between dense and MoE heads.",
            "landscape",
            [*each(q.RADIUS, _is_other, against_dense), *each(q.SHAPE, _is_other, against_dense)],
        ),
        (
            "Conditional routing brings no inference speed-up at this scale (whole model, batch of 256).",
            "speed",
            [_speed(runs, "sparse")],
        ),
    ]
    return [
        Verdict(number, claim, tuple(statements), figure, num_seeds)
        for number, (claim, figure, statements) in enumerate(claims, start=1)
    ]


def _is_above(c: Comparison) -> Statement:
    text = f"{c.head} − {c.baseline}" if not c.quantity.is_ratio else f"{c.head} / {c.baseline}"
    return Statement(f"{c.quantity.title}: {text} = {_told(c)}", True if c.sign > 0 else False if c.sign < 0 else None)


def _is_other(c: Comparison) -> Statement:
    is_alike = c.is_within(SHARPNESS_MARGIN)
    return Statement(_is_above(c).text, True if c.sign else False if is_alike else None)


def _is_alike(margin: float) -> Callable[[Comparison], Statement]:
    def rule(c: Comparison) -> Statement:
        shown = f"a factor {margin:g}" if c.quantity.is_ratio else f"±{c.quantity.scale * margin:g}"
        text = f"{_is_above(c).text}; alike means within {shown}"
        return Statement(text, True if c.is_within(margin) else False if c.is_beyond(margin) else None)

    return rule


def _balance(runs: Sequence[Run], head: str) -> Statement:
    """Held up where the interval of the least used expert's load lies above a quarter of its share, in every run."""
    values = list(values_of(runs, q.BALANCE, head).values())
    found = estimate(values)
    if found is None:
        return Statement(f"{head}: no load was measured", None)
    text = (
        f"{head}: the least used expert has {found.format('.2f')} of its fair share, {min(values):.2f} in the worst of"
        f" {len(values)} runs; collapse means below {FAIR_SHARE:g}"
    )
    if min(values) < FAIR_SHARE:
        return Statement(text, False)
    return Statement(text, True if found.low is not None and found.low > FAIR_SHARE else None)


def _speed(runs: Sequence[Run], head: str) -> Statement:
    """Held up where the speed-up of the whole model is below 5 %."""
    whole = estimate(list(values_of(runs, q.SPEEDUP, head).values()), is_ratio=True)
    alone = estimate(list(values_of(runs, q.HEAD_SPEEDUP, head).values()), is_ratio=True)
    if whole is None:
        return Statement(f"{head}: no speed was measured", None)
    text = f"{head}: the model runs {whole.format('.3f')} times as fast as with the dense head of equal capacity"
    if alone is not None:
        text += f", the head by itself {alone.format('.2f')} times"
    text += f"; a speed-up means above {SPEED_MARGIN:g}"
    if whole.low is None or whole.high is None:
        return Statement(text, None)
    return Statement(text, True if whole.high < SPEED_MARGIN else False if whole.low > SPEED_MARGIN else None)


def _told(c: Comparison) -> str:
    told = c.difference.format(".3f" if c.quantity.is_ratio else "+.3g", c.quantity.scale)
    return told if c.adjusted_p_value is None else f"{told}, p = {c.adjusted_p_value:.2g}"


def _absent(quantity: Quantity, head: str, baseline: str) -> Statement:
    return Statement(f"{quantity.title}: not measured for both {head} and {baseline}", None)

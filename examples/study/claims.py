"""The six claims of arXiv 2601.15021, one function each.

A claim is a conjunction of statements. Each statement is supported, contradicted, or undecided with the available
seeds. To change the test of a claim, edit its function: `accuracy` (claim 1), `balanced_experts` (2), `curvature` (3),
`generalization` (4), `landscape_shape` (5) or `routing_speed` (6). `RULES` explains the tests in the report. The
correction of the tests of `is_above` may leave a claim undecided, but it never contradicts one.
"""

from collections.abc import Callable, Sequence

from study import quantities as q
from study.results import Run
from study.rules import Evidence, Verdict, are_alike, is_above, is_balanced, is_different, is_not_faster
from study.statistics import Comparison, adjusted, compare

# Smaller differences are irrelevant. The report states these margins.
SLIGHT_ACCURACY_MARGIN = 0.001
ACCURACY_MARGIN = 0.005
GAP_MARGIN = 0.05
SHARPNESS_MARGIN = 1.25
SPEED_MARGIN = 1.05
FAIR_SHARE = 0.25

MOE_HEADS = ("soft", "sparse")

RULES = f"""\
A claim is a conjunction of the statements below it. It is supported when all statements are supported, not supported
when one is contradicted, and undecided otherwise. A statement that one head is *above* another is supported by a
corrected test at the 5 % level. It is contradicted by a corrected test in the other direction, or if the 90 % interval
lies within the margin ("no difference") and the 95 % interval does not lie entirely above equality. A statement that
two heads are *equivalent* is supported if the 90 % interval lies within the margin (two one-sided tests at 5 %), and
contradicted if the 95 % interval lies outside. Claim 5 is supported if the 95 % interval of one of its two quantities
lies outside the margin, and contradicted if both are equivalent. Claim 2 is supported if the least-used expert has more
than {FAIR_SHARE:g} of its fair share 1/E in every run and with the whole interval of the mean. It does not test that
regularization is the cause, since every head was trained with it. Claim 6 is supported if the whole interval lies below
{SPEED_MARGIN:g}. The claims concern the heads of the paper, soft and sparse (k = 2). A head with k = 1 (hard) does not
enter them."""

_AGAINST_DENSE = tuple((head, "dense") for head in MOE_HEADS)
_SOFT_AGAINST_OTHERS = (("soft", "dense"), ("soft", "sparse"))
_CURVATURES = (q.LAMBDA_TRAIN, q.TRACE_TRAIN)

# The tests of `is_above`, which are corrected together.
_CORRECTED = (
    *((q.ACCURACY, *pair) for pair in _AGAINST_DENSE),
    *((quantity, *pair) for quantity in _CURVATURES for pair in _SOFT_AGAINST_OTHERS),
)


def accuracy(evidence: Evidence) -> Verdict:
    """Decide claim 1: both MoE heads are slightly more accurate."""
    return Verdict(
        number=1,
        name="accuracy",
        claim="Both MoE heads are slightly more accurate than Dense.",
        statements=evidence.test(q.ACCURACY, is_above(SLIGHT_ACCURACY_MARGIN), _AGAINST_DENSE),
        figure="accuracy",
    )


def balanced_experts(evidence: Evidence) -> Verdict:
    """Decide claim 2: expert load stays balanced."""
    return Verdict(
        number=2,
        name="balanced_experts",
        claim="Balance regularization keeps the expert load balanced; no expert collapses.",
        statements=tuple(is_balanced(evidence, head, FAIR_SHARE) for head in MOE_HEADS),
        figure="utilization",
    )


def curvature(evidence: Evidence) -> Verdict:
    """Decide claim 3: SoftMoE is sharper."""
    return Verdict(
        number=3,
        name="curvature",
        claim="SoftMoE is sharper than Dense and SparseMoE, which are equivalent (λmax and trace, training data).",
        statements=tuple(
            statement
            for quantity in _CURVATURES
            for statement in (
                *evidence.test(quantity, is_above(SHARPNESS_MARGIN), _SOFT_AGAINST_OTHERS),
                *evidence.test(quantity, are_alike(SHARPNESS_MARGIN), [("sparse", "dense")]),
            )
        ),
        figure="sharpness",
    )


def generalization(evidence: Evidence) -> Verdict:
    """Decide claim 4: all heads generalize equally well."""
    return Verdict(
        number=4,
        name="generalization",
        claim="All heads generalize equally well.",
        statements=(
            *evidence.test(q.GAP, are_alike(GAP_MARGIN), _AGAINST_DENSE),
            *evidence.test(q.ACCURACY, are_alike(ACCURACY_MARGIN), _AGAINST_DENSE),
        ),
        figure="generalization",
    )


def landscape_shape(evidence: Evidence) -> Verdict:
    """Decide claim 5: finite perturbations change the loss of MoE heads differently."""
    return Verdict(
        number=5,
        name="landscape_shape",
        claim="Finite perturbations show qualitative differences between dense and MoE heads.",
        statements=tuple(is_different(evidence, (q.RISE, q.SHAPE), pair, SHARPNESS_MARGIN) for pair in _AGAINST_DENSE),
        figure="landscape",
    )


def routing_speed(evidence: Evidence) -> Verdict:
    """Decide claim 6: conditional routing does not speed up inference."""
    return Verdict(
        number=6,
        name="routing_speed",
        claim="Conditional routing does not speed up inference at this scale (whole model, batch of 256).",
        statements=(is_not_faster(evidence, "sparse", SPEED_MARGIN),),
        figure="speed",
    )


CLAIMS: tuple[Callable[[Evidence], Verdict], ...] = (
    accuracy,
    balanced_experts,
    curvature,
    generalization,
    landscape_shape,
    routing_speed,
)
"""The claims in the order of the report."""


def comparisons_of(runs: Sequence[Run], heads: Sequence[str]) -> list[Comparison]:
    """Compare every head with the dense one, and soft with sparse; correct the p-values of tests that decide claims."""
    pairs = [(head, "dense") for head in heads if head != "dense" and "dense" in heads]
    pairs += [("soft", "sparse")] if {"soft", "sparse"} <= set(heads) else []
    wanted = [(quantity, *pair) for quantity in q.QUANTITIES if quantity.is_compared for pair in pairs]
    made = {which: compare(runs, *which) for which in wanted}
    found = {which: comparison for which, comparison in made.items() if comparison is not None}
    tested = [which for which in _CORRECTED if which in found]
    found |= dict(zip(tested, adjusted([found[which] for which in tested]), strict=True))
    return list(found.values())


def verdicts(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[Verdict]:
    """Decide all six claims."""
    evidence = Evidence(runs, {(c.quantity, c.head, c.baseline): c for c in comparisons})
    return [claim(evidence) for claim in CLAIMS]

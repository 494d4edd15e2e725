"""Warnings about a router with dead experts or a collapsed routing, with advice."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moe_heads.analysis.expert_utilization.advice import Advice
from moe_heads.analysis.expert_utilization.head_utilization import dead_and_starved
from moe_heads.routing import RoutingStats

__all__ = ["MIN_FAIR_SHARE", "RouterHealth"]

# Position between one expert and all of them below which the effective number of experts is a collapse.
_COLLAPSED_BELOW = 0.5

MIN_FAIR_SHARE = 10
"""Fair share of an expert, in choices, from which an expert without any is significant. With a fair share of one, an
even router leaves every third expert without any by chance. With ten, it is one expert in 20,000."""

# The same for a quarter of the fair share. At ten choices an even router of 64 experts has one such expert in every
# sixth epoch, at twenty in one of a thousand.
_MIN_FAIR_SHARE_OF_STARVING = 20

# All choices together show a collapse. With a fair share of two and a hundred choices in total, an even router uses
# more than three quarters of its experts.
_MIN_FAIR_SHARE_OF_COLLAPSE, _MIN_CHOICES_OF_COLLAPSE = 2, 100

# A symptom is its kind and the expert, or -1 for all experts.
_Symptom = tuple[str, int]
_COLLAPSE: _Symptom = ("collapse", -1)

# Largest number of experts that a sentence names.
_MAX_NAMED = 8


@dataclass(frozen=True)
class _Diagnosis:
    """State of the experts of a router according to its statistics.

    Attributes:
        measure: Quantity whose shares are compared.
        relative: Share of each expert in units of the fair share.
        effective_experts: Effective number of experts.
        can_judge_collapse: Whether there were enough choices to detect a collapse.
        can_judge_experts: Whether there were enough choices to detect dead experts.
        collapsed: Whether the effective number of experts is closer to one than to all.
        dead: Experts that are dead.
        underused: Experts that are dead or starved.
    """

    measure: str
    relative: list[float]
    effective_experts: float
    can_judge_collapse: bool
    can_judge_experts: bool
    collapsed: bool
    dead: frozenset[int]
    underused: frozenset[int]

    @property
    def symptoms(self) -> set[_Symptom]:
        symptoms = {("dead", expert) for expert in self.dead} | {("underused", expert) for expert in self.underused}
        return symptoms | ({_COLLAPSE} if self.collapsed else set())


class RouterHealth:
    """Generator of warnings about the experts of one router. It repeats a warning only after the symptom was gone.

    Args:
        soft: Whether the router mixes all experts. Then the mixing weight is compared, else the load.
        advice: Options to change.
        dead_below: Fraction of the fair share below which an expert is dead.
        starved_below: Fraction of the fair share below which an expert is starved.
    """

    def __init__(self, soft: bool, advice: Advice, dead_below: float, starved_below: float) -> None:
        self._soft, self._advice = soft, advice
        self._dead_below, self._starved_below = dead_below, starved_below
        self._had_nonfinite = False
        self._warned: set[_Symptom] = set()
        self._warned_in_evaluation: set[_Symptom] = set()
        self._previous_in_evaluation: set[_Symptom] = set()

    def new_warnings(self, stats: RoutingStats, in_evaluation: RoutingStats | None = None) -> Iterator[str]:
        """Yield the warnings about the symptoms of an epoch that were not present before.

        Args:
            stats: Statistics of the training batches of the epoch.
            in_evaluation: Statistics of the validation batches, if there were any. Symptoms that only they show, twice
                in a row, are reported too: in training, noise can hide that an expert is unused in evaluation. A single
                occurrence proves little, since a validation uses the weights at the end of the epoch.

        Yields:
            A sentence on rows with non-finite logits, one on the training, and one on the validation: collapse, dead
            experts and starved experts, with advice. A sparse router needs enough choices for a warning, because an
            even router leaves experts without choices by chance. Dead experts need a fair share of 10 choices, and
            starved experts of 20. A collapse needs a fair share of 10, or of 2 with a hundred choices in total.
        """
        has_nonfinite, had_nonfinite = int(stats.num_nonfinite) > 0, self._had_nonfinite
        self._had_nonfinite = has_nonfinite
        if has_nonfinite and not had_nonfinite:
            number = int(stats.num_rows) + int(stats.num_nonfinite)
            yield (
                f"{int(stats.num_nonfinite)} of {number} rows had router logits that are nan or infinite and were"
                " excluded. Lower the learning rate, or clip the gradients."
            )
        training = self._diagnose(stats)
        if text := _describe_new(training, training.symptoms, self._warned):
            yield f"{text}. {self._advice.in_training}"
        if in_evaluation is None or not int(in_evaluation.num_rows) or not training.can_judge_collapse:
            return
        evaluation = self._diagnose(in_evaluation)
        symptoms = evaluation.symptoms - training.symptoms
        if not training.can_judge_experts:  # then "not in training" is unknown for single experts
            symptoms &= {_COLLAPSE}
        lasting, self._previous_in_evaluation = symptoms & self._previous_in_evaluation, symptoms
        if text := _describe_new(evaluation, lasting, self._warned_in_evaluation):
            yield f"on the validation data, but not in training, {text}. {self._advice.in_evaluation}"

    def dead(self, stats: RoutingStats) -> tuple[int, ...]:
        """Return the dead experts, for any number of choices of at least one row."""
        return dead_and_starved(self._relative(stats), self._dead_below, self._starved_below)[0]

    def counts(self, stats: RoutingStats) -> dict[str, float]:
        """Count the dead and the starved experts, for any number of choices. Return nothing without a row."""
        if not int(stats.num_rows):
            return {}
        dead, starved = dead_and_starved(self._relative(stats), self._dead_below, self._starved_below)
        return {"num_dead_experts": float(len(dead)), "num_starved_experts": float(len(starved))}

    def _relative(self, stats: RoutingStats) -> list[float]:
        share = (stats.importance if self._soft else stats.load).double().cpu()
        found: list[float] = (share * len(share)).tolist()
        return found

    def _diagnose(self, stats: RoutingStats) -> _Diagnosis:
        relative = self._relative(stats)
        num_experts = len(relative)
        num_choices = int(stats.counts.sum())
        fair_share = math.inf if self._soft else num_choices / num_experts
        effective_experts = math.exp(float(torch.special.entr(stats.importance.double()).sum()))
        is_many = fair_share >= _MIN_FAIR_SHARE_OF_COLLAPSE and num_choices >= _MIN_CHOICES_OF_COLLAPSE
        can_judge_collapse = (fair_share >= MIN_FAIR_SHARE or is_many) and int(stats.num_rows) > 0
        can_judge_experts = can_judge_collapse and fair_share >= MIN_FAIR_SHARE
        dead, starved = (
            dead_and_starved(relative, self._dead_below, self._starved_below) if can_judge_experts else ((), ())
        )
        return _Diagnosis(
            measure="mixing weight" if self._soft else "load",
            relative=relative,
            effective_experts=effective_experts,
            can_judge_collapse=can_judge_collapse,
            can_judge_experts=can_judge_experts,
            collapsed=can_judge_collapse and effective_experts < 1 + _COLLAPSED_BELOW * (num_experts - 1),
            dead=frozenset(dead),
            underused=frozenset({*dead, *starved} if fair_share >= _MIN_FAIR_SHARE_OF_STARVING else dead),
        )


def _describe_new(diagnosis: _Diagnosis, symptoms: set[_Symptom], warned: set[_Symptom]) -> str:
    """Describe the symptoms that are not in ``warned``, and set ``warned`` to the current symptoms."""
    new = symptoms - warned
    warned &= symptoms
    warned |= symptoms
    num_experts = len(diagnosis.relative)
    parts = []
    if _COLLAPSE in new:
        parts.append(f"the routing collapses to {diagnosis.effective_experts:.1f} effective experts of {num_experts}")
    dead = sorted(expert for kind, expert in new if kind == "dead")
    # no warning if a dead expert recovers to a starved one, and no second warning that a dead expert is starved
    starved = sorted(expert for kind, expert in new if kind == "underused" and ("dead", expert) not in symptoms)
    for state, experts in (("dead", dead), ("starved", starved)):
        if experts:
            parts.append(f"{len(experts)} of {num_experts} experts {state}: {_list_experts(experts, diagnosis)}")
    return "; ".join(parts)


def _list_experts(experts: Sequence[int], diagnosis: _Diagnosis) -> str:
    """List the experts by number, each with its fraction of the fair share."""
    shares = [f"{diagnosis.relative[expert]:.1%}" for expert in experts[:_MAX_NAMED]]
    shares[0] += f" of the fair share of the {diagnosis.measure}"
    named = ", ".join(f"{expert} ({share})" for expert, share in zip(experts, shares, strict=False))
    numbers = "number" if len(experts) == 1 else "numbers"
    more = f" and {len(experts) - _MAX_NAMED} more" if len(experts) > _MAX_NAMED else ""
    return f"{numbers} {named}{more}"

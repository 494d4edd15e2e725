"""What to tell about a router whose experts die or collapse, and what to change."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moe_heads.analysis.expert_utilization.advice import Remedies
from moe_heads.analysis.expert_utilization.head import dead_and_starved
from moe_heads.routing import RoutingStats

__all__ = ["LEAST_EXPECTED", "RouterHealth"]

# Where between one expert and all of them the number in effect lies when a router has collapsed.
_COLLAPSED_BELOW = 0.5

LEAST_EXPECTED = 10
"""Choices that are each expert's fair share before one that got none tells something: where it is one choice, chance
leaves every third expert of an even router without any, where it is ten, one in 20,000."""

# Likewise before a quarter of the fair share tells something: at ten choices an even router of 64 experts shows one
# such expert in every sixth epoch, at twenty in one of a thousand.
_LEAST_EXPECTED_OF_STARVING = 20

# A collapse shows in all choices together: of two a fair share and a hundred in all, an even router spreads its choices
# over more than three quarters of its experts.
_LEAST_EXPECTED_OF_COLLAPSE, _LEAST_CHOICES_OF_COLLAPSE = 2, 100

_COLLAPSE = ("collapse", -1)

# Numbers of experts that a sentence names.
_MAX_NAMED = 8


@dataclass(frozen=True)
class _Findings:
    """What statistics show of a router.

    Attributes:
        what: What the experts have shares of.
        relative: Share of each expert in units of the fair share.
        in_effect: Effective number of experts.
        is_judged: Whether there were choices enough to tell a collapse.
        tells_experts: Whether there were enough to tell who is dead.
        collapsed: Whether the experts in effect are nearer to one than to all.
        dead: Experts that are dead.
        ill: Experts that are dead or starve.
    """

    what: str
    relative: list[float]
    in_effect: float
    is_judged: bool
    tells_experts: bool
    collapsed: bool
    dead: frozenset[int]
    ill: frozenset[int]


class RouterHealth:
    """Tells what is wrong with the experts of one router, each thing once until it is over.

    Args:
        soft: Whether the router mixes all experts: the weight decides then, else the load.
        remedies: What can be changed.
        dead_below: Fraction of the fair share under which an expert is dead.
        starved_below: Fraction under which it is starved.
    """

    def __init__(self, soft: bool, remedies: Remedies, dead_below: float, starved_below: float) -> None:
        self._soft, self._remedies = soft, remedies
        self._dead_below, self._starved_below = dead_below, starved_below
        self._had_nonfinite = False
        self._told: set[tuple[str, int]] = set()
        self._told_in_evaluation: set[tuple[str, int]] = set()
        self._seen_in_evaluation: set[tuple[str, int]] = set()

    def news(self, stats: RoutingStats, in_evaluation: RoutingStats | None = None) -> Iterator[str]:
        """What an epoch shows and no earlier one did.

        Args:
            stats: Statistics of the epoch's training batches.
            in_evaluation: Those of the validation batches, if there were any. What only they show, twice in a row, is
                told too: noise in training can keep an expert busy that nobody gets to see afterwards. The first time
                proves little, since the weights of a validation are those of the end of the epoch.

        Yields:
            A sentence on rows without finite logits, one on the training and one on the validation: collapse, dead
            experts and starving ones, and what to change. A router that chooses has to have chosen: dead experts need
            a fair share of 10 choices, starving ones of 20, since fewer leave experts of an even router without any; a
            collapse needs 10, or 2 and a hundred choices in all.
        """
        has_nonfinite, had_nonfinite = int(stats.num_nonfinite) > 0, self._had_nonfinite
        self._had_nonfinite = has_nonfinite
        if has_nonfinite and not had_nonfinite:
            number = int(stats.num_rows) + int(stats.num_nonfinite)
            yield (
                f"{int(stats.num_nonfinite)} of {number} rows had router logits that are nan or infinite, and counted"
                " in nothing. Lower the learning rate, or clip the gradients."
            )
        trained = self._findings(stats)
        if new := _new(trained, _signs(trained), self._told):
            yield f"{new}. {self._remedies.in_training}"
        if in_evaluation is None or not int(in_evaluation.num_rows) or not trained.is_judged:
            return
        found = self._findings(in_evaluation)
        signs = _signs(found) - _signs(trained)
        if not trained.tells_experts:  # nobody can say "not in training" of them
            signs &= {_COLLAPSE}
        lasting, self._seen_in_evaluation = signs & self._seen_in_evaluation, signs
        if new := _new(found, lasting, self._told_in_evaluation):
            yield f"on the validation data, and not in training, {new}. {self._remedies.in_evaluation}"

    def counts(self, stats: RoutingStats) -> dict[str, float]:
        """How many experts are dead or starve, however few choices there were; nothing without a row."""
        if not int(stats.num_rows):
            return {}
        dead, starved = dead_and_starved(self._relative(stats), self._dead_below, self._starved_below)
        return {"num_dead_experts": float(len(dead)), "num_starved_experts": float(len(starved))}

    def _relative(self, stats: RoutingStats) -> list[float]:
        share = (stats.importance if self._soft else stats.load).double().cpu()
        found: list[float] = (share * len(share)).tolist()
        return found

    def _findings(self, stats: RoutingStats) -> _Findings:
        relative = self._relative(stats)
        num_experts = len(relative)
        num_choices = int(stats.counts.sum())
        fair_share = math.inf if self._soft else num_choices / num_experts
        in_effect = math.exp(float(torch.special.entr(stats.importance.double()).sum()))
        is_many = fair_share >= _LEAST_EXPECTED_OF_COLLAPSE and num_choices >= _LEAST_CHOICES_OF_COLLAPSE
        is_judged = (fair_share >= LEAST_EXPECTED or is_many) and int(stats.num_rows) > 0
        tells_experts = is_judged and fair_share >= LEAST_EXPECTED
        dead, starved = dead_and_starved(relative, self._dead_below, self._starved_below) if tells_experts else ((), ())
        collapsed = is_judged and in_effect < 1 + _COLLAPSED_BELOW * (num_experts - 1)
        ill = {*dead, *starved} if fair_share >= _LEAST_EXPECTED_OF_STARVING else {*dead}
        what = "mixing weight" if self._soft else "load"
        dead_ones, ill_ones = frozenset(dead), frozenset(ill)
        return _Findings(what, relative, in_effect, is_judged, tells_experts, collapsed, dead_ones, ill_ones)


def _signs(found: _Findings) -> set[tuple[str, int]]:
    """What is wrong, each with the expert; -1 for all of them."""
    signs = {("dead", expert) for expert in found.dead} | {("ill", expert) for expert in found.ill}
    return signs | ({_COLLAPSE} if found.collapsed else set())


def _new(found: _Findings, signs: set[tuple[str, int]], told: set[tuple[str, int]]) -> str:
    """What to say of the signs that were not told; they are told from now on, and those that are over no longer."""
    new = signs - told
    told &= signs
    told |= signs
    num_experts = len(found.relative)
    parts = []
    if _COLLAPSE in new:
        parts.append(f"the routing collapses, {found.in_effect:.1f} of {num_experts} experts are in effect")
    dead = sorted(expert for sign, expert in new if sign == "dead")
    # one that recovers from death is no news, and one that is told to be dead need not be told to starve
    starving = sorted(expert for sign, expert in new if sign == "ill" and ("dead", expert) not in signs)
    for state, experts in (("dead", dead), ("starving", starving)):
        if experts:
            parts.append(f"{len(experts)} of {num_experts} experts {state}: {_named(experts, found)}")
    return "; ".join(parts)


def _named(experts: Sequence[int], found: _Findings) -> str:
    """The experts by number, each with its part of the fair share."""
    shares = [f"{found.relative[expert]:.1%}" for expert in experts[:_MAX_NAMED]]
    shares[0] += f" of the fair share of the {found.what}"
    named = ", ".join(f"{expert} ({share})" for expert, share in zip(experts, shares, strict=False))
    numbers = "number" if len(experts) == 1 else "numbers"
    more = f" and {len(experts) - _MAX_NAMED} more" if len(experts) > _MAX_NAMED else ""
    return f"{numbers} {named}{more}"

"""What to tell about a router whose experts die or collapse, and what to change."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moe_heads.callbacks.functional.utilization.remedies import Remedies
from moe_heads.routing import RoutingStats

__all__ = ["LEAST_EXPECTED", "RouterHealth"]

# Where between one expert and all of them the number in effect lies when a router has collapsed.
_COLLAPSED_BELOW = 0.5

LEAST_EXPECTED = 10
"""Choices that are each expert's fair share before one that got few tells something: where it is one choice, chance
leaves every third expert of an even router without any."""

_IN_EVALUATION = "on the validation data, and not in training, "


@dataclass(frozen=True)
class _Findings:
    """What statistics show of a router.

    Attributes:
        relative: Share of each expert in units of the fair share.
        in_effect: Effective number of experts.
        collapsed: Whether they are nearer to one than to all.
        dead: Experts that are dead.
        ill: Experts that are dead or starve.
    """

    relative: list[float]
    in_effect: float
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
        self._told: set[tuple[str, str, int]] = set()

    def news(self, stats: RoutingStats, in_evaluation: RoutingStats | None = None) -> Iterator[str]:
        """What an epoch shows and no earlier one did.

        Args:
            stats: Statistics of the epoch's training batches.
            in_evaluation: Those of the validation batches, if there were any: what only they show is told too, since
                noise in training can keep an expert busy that nobody gets to see afterwards.

        Yields:
            A sentence for collapse, for dead experts and for starving ones, and what to change. Of a router that
            chooses the last two need a fair share of 10 choices: fewer leave experts of an even router without any.
        """
        trained = self._findings(stats)
        yield from self._told_of(trained, "", self._remedies.in_training)
        if in_evaluation is not None and int(in_evaluation.num_rows):
            found = self._findings(in_evaluation)
            only_there = _Findings(
                found.relative,
                found.in_effect,
                found.collapsed and not trained.collapsed,
                found.dead - trained.dead,
                found.ill - trained.ill | (found.dead - trained.dead),
            )
            yield from self._told_of(only_there, _IN_EVALUATION, self._remedies.in_evaluation)

    def _findings(self, stats: RoutingStats) -> _Findings:
        share = (stats.importance if self._soft else stats.load).double().cpu()
        num_experts = len(share)
        in_effect = math.exp(float(torch.special.entr(stats.importance.double()).sum()))
        is_told = self._soft or int(stats.counts.sum()) >= LEAST_EXPECTED * num_experts
        relative = (share * num_experts).tolist()
        dead = {e for e, r in enumerate(relative) if is_told and (r == 0 or r < self._dead_below)}
        starving = {e for e, r in enumerate(relative) if is_told and r < self._starved_below}
        collapsed = in_effect < 1 + _COLLAPSED_BELOW * (num_experts - 1)
        return _Findings(relative, in_effect, collapsed, frozenset(dead), frozenset(dead | starving))

    def _told_of(self, found: _Findings, where: str, remedy: str) -> Iterator[str]:
        num_experts = len(found.relative)
        if self._is_news(where, "collapse", -1, found.collapsed):
            in_effect = f"{found.in_effect:.1f} of {num_experts} experts"
            yield f"{where}the routing collapses: {in_effect} are in effect. {remedy}"
        experts = range(num_experts)
        dead = [e for e in experts if self._is_news(where, "dead", e, e in found.dead)]
        # one that recovers from death is no news, and one that is told to be dead need not be told to starve
        starving = [e for e in experts if self._is_news(where, "ill", e, e in found.ill) and e not in found.dead]
        for state, new, below in (("dead", dead, self._dead_below), ("starving", starving, self._starved_below)):
            if new:
                told = ", ".join(f"{expert} ({found.relative[expert]:.1%})" for expert in new)
                numbers = "number" if len(new) == 1 else "numbers"
                what = "mixing weight" if self._soft else "load"
                yield (
                    f"{where}{state} among {num_experts} experts: {numbers} {told} of the fair share of the {what};"
                    f" the limit is {below:.0%}. {remedy}"
                )

    def _is_news(self, where: str, state: str, expert: int, holds: bool) -> bool:
        """Whether something holds that did not hold before; then it is told once, until it is over."""
        key = where, state, expert
        was = key in self._told
        if holds:
            self._told.add(key)
        else:
            self._told.discard(key)
        return holds and not was

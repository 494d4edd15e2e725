"""What to tell about a router whose experts die or collapse, and what to change."""

import math
from collections.abc import Iterator

import torch

from moe_heads.routing import RoutingStats

__all__ = ["RouterHealth"]

# Where between one expert and all of them the number in effect lies when a router has collapsed.
_COLLAPSED_BELOW = 0.5

# Choices that are each expert's fair share before one that got few is told: where it is one choice, chance leaves
# every third expert of an even router without any.
_LEAST_EXPECTED = 10

_REMEDY = (
    "Raise the coefficients of balance={...}, route with noise (noisy=True) or by a router that balances by itself"
    " (moe_heads.routers.BiasBalancedRouter, ExpertChoiceRouter), or lower the learning rate of the router."
)
_REMEDY_SOFT = "Raise the temperature or the coefficient of balance={'kl': ...}, or lower the learning rate."


class RouterHealth:
    """Tells what is wrong with the experts of one router, each thing once until it is over.

    Args:
        soft: Whether the router mixes all experts: the weight decides then, else the load.
        dead_below: Fraction of the fair share under which an expert is dead.
        starved_below: Fraction under which it is starved.
    """

    def __init__(self, soft: bool, dead_below: float, starved_below: float) -> None:
        self._soft = soft
        self._dead_below, self._starved_below = dead_below, starved_below
        self._told: set[tuple[str, int]] = set()

    def news(self, stats: RoutingStats) -> Iterator[str]:
        """What an epoch shows and no earlier one did.

        Args:
            stats: Statistics of the epoch.

        Yields:
            A sentence for collapse, for dead experts and for starving ones, and what to change. Of a router that
            chooses the last two need a fair share of 10 choices: fewer leave experts of an even router without any.
        """
        share = (stats.importance if self._soft else stats.load).double().cpu()
        num_experts, remedy = len(share), _REMEDY_SOFT if self._soft else _REMEDY
        in_effect = math.exp(float(torch.special.entr(stats.importance.double()).sum()))
        if self._is_news("collapse", -1, in_effect < 1 + _COLLAPSED_BELOW * (num_experts - 1)):
            yield f"the routing collapses: {in_effect:.1f} of {num_experts} experts are in effect. {remedy}"
        if not self._soft and int(stats.counts.sum()) < _LEAST_EXPECTED * num_experts:
            return
        relative = dict(enumerate((share * num_experts).tolist()))
        is_dead = {e: r == 0 or r < self._dead_below for e, r in relative.items()}
        is_ill = {e: is_dead[e] or r < self._starved_below for e, r in relative.items()}
        dead = [expert for expert, holds in is_dead.items() if self._is_news("dead", expert, holds)]
        # one that recovers from death is no news, and one that is told to be dead need not be told to starve
        starving = [e for e, holds in is_ill.items() if self._is_news("ill", e, holds) and not is_dead[e]]
        states = (("dead", dead, self._dead_below), ("starving", starving, self._starved_below))
        for state, new, below in states:
            if new:
                told = ", ".join(f"{expert} ({relative[expert]:.1%})" for expert in new)
                numbers = "number" if len(new) == 1 else "numbers"
                what = "mixing weight" if self._soft else "load"
                yield (
                    f"{state} among {num_experts} experts: {numbers} {told} of the fair share of the {what};"
                    f" the limit is {below:.0%}. {remedy}"
                )

    def _is_news(self, state: str, expert: int, holds: bool) -> bool:
        """Whether something holds that did not hold before; then it is told once, until it is over."""
        was = (state, expert) in self._told
        if holds:
            self._told.add((state, expert))
        else:
            self._told.discard((state, expert))
        return holds and not was

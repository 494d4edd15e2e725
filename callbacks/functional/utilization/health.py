"""What to tell about a router whose experts die or collapse, and what to change."""

import math
from collections.abc import Iterator

import torch

from moe_heads.routing import RoutingStats

__all__ = ["RouterHealth"]

# Share of the experts in effect below which a router has collapsed.
_COLLAPSED_BELOW = 0.5

_REMEDY = (
    "Raise the coefficients of balance={...}, route with noise (noisy=True) or by a router that balances by itself"
    " (moe_heads.routers.BiasBalancedRouter, ExpertChoiceRouter), or lower the learning rate of the router."
)
_REMEDY_SOFT = "Raise the temperature or the coefficient of balance={'kl': ...}, or lower the learning rate."


class RouterHealth:
    """Tells what is wrong with the experts of one router, each thing once.

    Args:
        soft: Whether the router mixes all experts: the weight decides then, else the load.
        dead_below: Fraction of the fair share under which an expert is dead.
        starved_below: Fraction under which it is starved.
    """

    def __init__(self, soft: bool, dead_below: float, starved_below: float) -> None:
        self._soft = soft
        self._bounds = (("dead", -1.0, dead_below), ("starving", dead_below, starved_below))
        self._told: set[tuple[str, int]] = set()

    def news(self, stats: RoutingStats) -> Iterator[str]:
        """What an epoch shows and no earlier one did.

        Args:
            stats: Statistics of the epoch.

        Yields:
            A sentence for collapse, for dead experts and for starving ones, and what to change.
        """
        share = (stats.importance if self._soft else stats.load).double().cpu()
        num_experts, remedy = len(share), _REMEDY_SOFT if self._soft else _REMEDY
        in_effect = math.exp(float(torch.special.entr(stats.importance.double()).sum()))
        if in_effect < _COLLAPSED_BELOW * num_experts and self._is_new("collapse", -1):
            yield f"the routing collapses: {in_effect:.1f} of {num_experts} experts are in effect. {remedy}"
        relative = dict(enumerate((share * num_experts).tolist()))
        for state, lowest, below in self._bounds:
            ill = {e: r for e, r in relative.items() if lowest <= r < below or (state == "dead" and r == 0)}
            new = [expert for expert in ill if self._is_new(state, expert)]
            if new:
                told = ", ".join(f"{expert} ({ill[expert]:.1%})" for expert in new)
                what = "mixing weight" if self._soft else "load"
                yield (
                    f"of {num_experts} experts {state}: {told} of the fair share of the {what}; the limit is"
                    f" {below:.0%}. {remedy}"
                )

    def _is_new(self, state: str, expert: int) -> bool:
        is_new = (state, expert) not in self._told
        self._told.add((state, expert))
        return is_new

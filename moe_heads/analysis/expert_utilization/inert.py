"""Experts that are inert: they have their share of the load, and their output or their weights are near zero.

Shapes: E experts.
"""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from moe_heads.analysis.expert_utilization.expert_outputs import OutputNorms
from moe_heads.analysis.expert_utilization.expert_weights import UnknownExpertsError, find_experts
from moe_heads.analysis.expert_utilization.head_utilization import HeadUtilization
from moe_heads.analysis.expert_utilization.weight_health import WeightHealth, measure_weights, relative_to_median

__all__ = ["INERT_BELOW", "InertWarnings", "function_fields", "inert_experts"]

INERT_BELOW = 0.03
"""Fraction of the median of the layer below which a norm marks an inert expert. In docs/results.md it lies between the
smallest output of trained experts and those of experts whose weights decayed to zero."""

_ADVICE = (
    "They receive rows and add nothing to the output. Check that their weights are trained: the optimizer has them, no"
    " parameter is frozen, and the weight decay is not too large. An expert that stays inert can be reset to the"
    " weights of a healthy one."
)


def inert_experts(relative: Tensor, dead: Collection[int], inert_below: float) -> tuple[int, ...]:
    """Return the experts that are inert and not dead.

    Args:
        relative: Norm of each expert in units of the median of the layer, (E,).
        dead: Experts that are dead by their load.
        inert_below: Bound below which a norm is too small. A norm of zero always is.
    """
    return tuple(e for e, norm in enumerate(relative.tolist()) if (norm == 0 or norm < inert_below) and e not in dead)


def function_fields(
    model: nn.Module,
    router: nn.Module,
    head: HeadUtilization,
    outputs: Sequence[OutputNorms],
    inert_below: float,
) -> dict[str, Any]:
    """Return the fields of `HeadUtilization` about weights and outputs of the experts.

    Args:
        model: Model that contains the router.
        router: The router.
        head: The utilization of its experts.
        outputs: Norms of the outputs on the rows of each rank.
        inert_below: Fraction of the median below which an expert is inert.
    """
    fields: dict[str, Any] = {}
    left_out: dict[str, None] = {}
    norms: Tensor | None = None
    try:
        weights = measure_weights(find_experts(model, router, len(head.load)))
        norms = fields["weight_norms"] = weights.relative_norms
        fields["stable_ranks"] = weights.relative_stable_ranks
    except UnknownExpertsError as error:
        left_out[f"weight norms and stable ranks ({error})"] = None
    total = OutputNorms(None)
    for of_rank in outputs:
        total = total + of_rank
    if total.means is not None:
        norms = fields["output_norms"] = relative_to_median(total.means)
    else:
        left_out[f"output norms ({total.reason or 'no real row reached the router'})"] = None
    if norms is not None:
        fields["inert_experts"] = inert_experts(norms, head.dead_experts, inert_below)
    return {**fields, "left_out": tuple(left_out)}


class InertWarnings:
    """Generator of warnings about inert experts while training. It names each expert of a router once.

    Args:
        inert_below: Fraction of the median weight norm below which an expert is inert.
    """

    def __init__(self, inert_below: float) -> None:
        self._inert_below = inert_below
        self._warned: dict[str, set[int]] = {}

    def add(self, scalars: dict[str, float], name: str, weights: WeightHealth, dead: Collection[int]) -> list[str]:
        """Add the numbers to log for a router, and return its new warnings.

        Args:
            scalars: Receives the numbers.
            name: Name of the router.
            weights: Its weights.
            dead: Experts that are dead by their load.
        """
        relative = weights.relative_norms
        inert = inert_experts(relative, dead, self._inert_below)
        scalars |= {**weights.metrics(), "num_inert_experts": float(len(inert))}
        new = sorted(set(inert) - self._warned.setdefault(name, set()))
        self._warned[name] |= set(inert)
        if not new:
            return []
        listed = ", ".join(f"{expert} ({float(relative[expert]):.1%})" for expert in new)
        number = "number" if len(new) == 1 else "numbers"
        return [f"{len(new)} of {len(relative)} experts inert: {number} {listed} of the median weight norm. {_ADVICE}"]

"""Advice on options to change if the experts of a router die or its routing collapses."""

from dataclasses import dataclass

from torch import nn

from moe_heads.routers import BiasBalancedRouter, ExpertChoiceRouter, LinearRouter, NoisyTopKRouter, SwitchRouter
from moe_heads.routing import Router

__all__ = ["Advice", "advice_for"]


@dataclass(frozen=True)
class Advice:
    """Advice for one router.

    Attributes:
        in_training: Advice for experts that are unused in training.
        in_evaluation: Advice for experts that are unused on the validation data only.
    """

    in_training: str
    in_evaluation: str


# Each remedy is measured by examples/benchmarks/collapse.py. Larger coefficients of the importance and load losses,
# noise, a higher temperature or a slower gate, by contrast, cost accuracy or did not help there.
_SOURCE = "(docs/results.md, Collapse)"
_DEFAULT = (
    "num_shared_experts=2, noisy=False, normalize=True and balance={'switch': 0.1}, the defaults, which kept each of 8"
    f" experts in use in 80 of 80 runs {_SOURCE}."
)
_WITH_ROUTER = "num_shared_experts=2, and the router with normalize=True"
_OTHER_DATA = "The validation data may differ, or dropout and batch statistics activate the experts in training"


def advice_for(router: nn.Module, soft: bool) -> Advice:
    """Return advice that names only options of this router.

    Args:
        router: The router. The options of a third-party router are unknown, so its advice is general.
        soft: Whether it mixes all experts.
    """
    if not isinstance(router, Router):
        return _advice(_FOREIGN_SOFT if soft else _FOREIGN)
    if isinstance(router, LinearRouter) and router.loss_watch.is_unused:
        return _advice("Add the balance loss of the router to the training loss.")
    if isinstance(router, ExpertChoiceRouter):
        return _advice("Every expert takes its share of the rows by construction. Only the weights differ.")
    if soft:
        return _advice(_SOFT)
    if isinstance(router, BiasBalancedRouter):
        return _advice(_BIAS)
    has_noise = isinstance(router, NoisyTopKRouter) and router.noise is not None
    has_default_gate = isinstance(router, LinearRouter) and router.normalize and router.balance.get("switch", 0) >= 0.1
    remedy = _SWITCH if isinstance(router, SwitchRouter) else _TOP_K
    if has_default_gate and not has_noise:
        remedy = _FEWER
    if isinstance(router, SwitchRouter) and router.jitter:
        return _advice(remedy, "The jitter may activate them in training")
    return _advice(remedy, "The noise may activate them in training" if has_noise else _OTHER_DATA)


def _advice(remedy: str, cause: str = _OTHER_DATA) -> Advice:
    return Advice(remedy, f"{cause}. {remedy}")


_TOP_K = f"Build the SparseMoE with {_DEFAULT}"
_SWITCH = (
    f"Build the SparseMoE with {_WITH_ROUTER} and balance={{'switch': 0.1}}, which kept every expert in use in 10 of 10"
    f" runs {_SOURCE}."
)
_FEWER = (
    "Build the SparseMoE with num_shared_experts=2 (the default), and with fewer experts or k = 2: of 16 experts with"
    f" k = 1 some had few choices in 8 of 10 runs, with k = 2 in none {_SOURCE}."
)
_BIAS = (
    f"Build the SparseMoE with {_WITH_ROUTER}, which kept every expert in use in 20 of 20 runs. Or raise update_rate:"
    f" with 0.01 instead of 0.001, fewer experts died {_SOURCE}."
)
_SOFT = (
    "Raise the coefficient of balance={'kl': ...}: the least used expert had 0.00 of its fair share without it, 0.43"
    f" with 0.2 and 0.82 with 1.0 {_SOURCE}."
)
_FOREIGN = (
    "Add shared experts that run on every row, normalize the input of the gate, and add a Switch loss with coefficient"
    f" 0.1: together they kept every expert in use in our benchmark {_SOURCE}."
)
_FOREIGN_SOFT = (
    "Add the divergence of the mean weights from uniform as a loss, with coefficient 0.2. It kept every expert in use"
    f" in our benchmark {_SOURCE}."
)

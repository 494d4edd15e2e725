"""Advice on options to change if the experts of a router die or its routing collapses."""

from dataclasses import dataclass

from torch import nn

from moe_heads.routers import BiasBalancedRouter, ExpertChoiceRouter, NoisyTopKRouter, SwitchRouter
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


# With these options no expert starved in 40 runs each with k = 1 and k = 2 (examples/benchmarks/collapse.py). Larger
# coefficients of the balance losses, by contrast, cost accuracy and more experts.
_MEASURED = (
    "num_shared_experts=1, noisy=False, normalize=True and balance={'switch': 0.1}, which kept every expert in use in"
    " 40 runs (docs/results.md, Collapse)."
)
_SLOWER = "or lower the learning rate of the router."
_OTHER_DATA = "The validation data may differ, or dropout and batch statistics activate the experts in training"


def advice_for(router: nn.Module, soft: bool) -> Advice:
    """Return advice that names only options of this router.

    Args:
        router: The router. The options of a third-party router are unknown, so its advice is general.
        soft: Whether it mixes all experts.
    """
    if not isinstance(router, Router):
        return _FOREIGN_SOFT if soft else _FOREIGN
    if soft or isinstance(router, ExpertChoiceRouter):
        return _WEIGHTS
    if isinstance(router, BiasBalancedRouter):
        return _BIAS
    remedy = f"build the SparseMoE with {_MEASURED}"
    cause = _OTHER_DATA
    if isinstance(router, NoisyTopKRouter) and router.noise is not None:
        cause = "The noise may activate them in training"
    elif isinstance(router, SwitchRouter) and router.jitter:
        cause = "The jitter may activate them in training"
    if not isinstance(router, NoisyTopKRouter):
        remedy = f"build the SparseMoE without router=..., and with {_MEASURED}"
    return Advice(remedy[0].upper() + remedy[1:], f"{cause}: {remedy}")


_WEIGHTS = Advice(
    f"Raise the temperature or the coefficient of balance={{'kl': ...}}, {_SLOWER}",
    f"{_OTHER_DATA}: raise the temperature or the coefficient of balance={{'kl': ...}}.",
)
_BIAS = Advice(
    f"Raise the update_rate of the router's bias, {_SLOWER}",
    f"{_OTHER_DATA}: train on larger batches, or reduce the dropout before the router.",
)
_FOREIGN_SOFT = Advice(
    "Raise its temperature, add a loss that balances its mean weights, or lower its learning rate.",
    f"{_OTHER_DATA}: add a loss that balances its mean weights.",
)
_FOREIGN = Advice(
    "Raise the coefficient of its balance loss, add noise to its logits in training, or lower its learning rate.",
    f"{_OTHER_DATA}, as noise on its logits would: reduce the noise, or raise the coefficient of its balance loss.",
)

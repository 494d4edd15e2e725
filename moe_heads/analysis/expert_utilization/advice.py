"""What to change where the experts of a router die or collapse."""

from dataclasses import dataclass

from torch import nn

from moe_heads.routers import BiasBalancedRouter, ExpertChoiceRouter, NoisyTopKRouter, SwitchRouter
from moe_heads.routing import Router

__all__ = ["Remedies", "remedies_for"]


@dataclass(frozen=True)
class Remedies:
    """Advice for one router.

    Attributes:
        in_training: Where the experts go without work in training.
        in_evaluation: Where they go without work on the validation data alone.
    """

    in_training: str
    in_evaluation: str


_BALANCE = "raise the coefficients of balance={...}"
_BALANCING_ROUTER = "use a router that balances by itself (moe_heads.routers.BiasBalancedRouter, ExpertChoiceRouter)"
_SLOWER = "or lower the learning rate of the router."
_OTHER_DATA = "The validation data may differ, or dropout and batch statistics give them work in training"


def remedies_for(router: nn.Module, soft: bool) -> Remedies:
    """Advice in terms of what can be set on this router.

    Args:
        router: The router; one that is not of this package has options that are not known.
        soft: Whether it mixes all experts.
    """
    if not isinstance(router, Router):
        return _FOREIGN_SOFT if soft else _FOREIGN
    if soft or isinstance(router, ExpertChoiceRouter):
        return _WEIGHTS
    if isinstance(router, BiasBalancedRouter):
        return _BIAS
    noisier, cause = "", f"{_OTHER_DATA}: "
    if isinstance(router, NoisyTopKRouter) and router.noise is None:
        noisier = "route with noise (noisy=True), "
    elif isinstance(router, NoisyTopKRouter):
        cause = "Its noise may give them work in training: route without it (noisy=False), or "
    elif isinstance(router, SwitchRouter) and router.jitter:
        cause = "Its jitter may give them work in training: lessen it, or "
    return Remedies(f"{_BALANCE.capitalize()}, {noisier}{_BALANCING_ROUTER}, {_SLOWER}", f"{cause}{_BALANCE}.")


_WEIGHTS = Remedies(
    f"Raise the temperature or the coefficient of balance={{'kl': ...}}, {_SLOWER}",
    f"{_OTHER_DATA}: raise the temperature or the coefficient of balance={{'kl': ...}}.",
)
_BIAS = Remedies(
    f"Raise the update_rate of the router's bias, {_SLOWER}",
    f"{_OTHER_DATA}: train on larger batches, or lessen the dropout before the router.",
)
_FOREIGN_SOFT = Remedies(
    "Raise its temperature, add a loss that evens out its mean weights, or lower its learning rate.",
    f"{_OTHER_DATA}: add a loss that evens out its mean weights.",
)
_FOREIGN = Remedies(
    "Raise the coefficient of its balance loss, add noise to its logits in training, or lower its learning rate.",
    f"{_OTHER_DATA}, as noise on its logits would: lessen the noise, or raise the coefficient of its balance loss.",
)

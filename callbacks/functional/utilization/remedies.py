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


_BALANCING_ROUTER = "use a router that balances by itself (moe_heads.routers.BiasBalancedRouter, ExpertChoiceRouter)"
_SLOWER = "or lower the learning rate of the router."
_OTHER_DATA = "The validation data may differ, or dropout and batch statistics give them work in training: "


def remedies_for(router: nn.Module, soft: bool) -> Remedies:
    """Advice in terms of what can be set on this router.

    Args:
        router: The router; one that is not of this package has options that are not known.
        soft: Whether it mixes all experts.
    """
    if not isinstance(router, Router):
        return _foreign(soft)
    if soft or isinstance(router, ExpertChoiceRouter):
        raised = "raise the temperature or the coefficient of balance={'kl': ...}"
        return Remedies(f"{raised.capitalize()}, {_SLOWER}", f"{_OTHER_DATA}{raised}.")
    if isinstance(router, BiasBalancedRouter):
        larger = "train on larger batches, or lessen the dropout before the router."
        return Remedies(f"Raise the update_rate of the router's bias, {_SLOWER}", _OTHER_DATA + larger)
    balance = "raise the coefficients of balance={...}"
    if isinstance(router, NoisyTopKRouter):
        if router.noise is None:
            noisier = f"Raise the coefficients of balance={{...}}, route with noise (noisy=True), {_BALANCING_ROUTER},"
            return Remedies(f"{noisier} {_SLOWER}", f"{_OTHER_DATA}{balance}.")
        quieter = "Its noise may give them work in training: route without it (noisy=False), or "
        return Remedies(f"{balance.capitalize()}, {_BALANCING_ROUTER}, {_SLOWER}", f"{quieter}{balance}.")
    if isinstance(router, SwitchRouter) and router.jitter:
        quieter = "Its jitter may give them work in training: lessen it, or "
        return Remedies(f"{balance.capitalize()}, {_BALANCING_ROUTER}, {_SLOWER}", f"{quieter}{balance}.")
    return Remedies(f"{balance.capitalize()}, {_BALANCING_ROUTER}, {_SLOWER}", f"{_OTHER_DATA}{balance}.")


def _foreign(soft: bool) -> Remedies:
    if soft:
        return Remedies(
            "Raise its temperature, add a loss that evens out its mean weights, or lower its learning rate.",
            f"{_OTHER_DATA}add a loss that evens out its mean weights.",
        )
    return Remedies(
        "Raise the coefficient of its balance loss, add noise to its logits in training, or lower its learning rate.",
        f"{_OTHER_DATA}so may noise on its logits; lessen it, or raise the coefficient of its balance loss.",
    )

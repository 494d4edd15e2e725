"""What to change where the experts of a router die or collapse."""

from dataclasses import dataclass

from torch import nn

from moe_heads.routers import BiasBalancedRouter
from moe_heads.routing import Router

__all__ = ["Remedies", "remedies_for"]


@dataclass(frozen=True)
class Remedies:
    """Advice for one router.

    Attributes:
        in_training: Where the experts go without work in training.
        in_evaluation: Where they go without work in evaluation alone.
    """

    in_training: str
    in_evaluation: str


_SPARSE = Remedies(
    "Raise the coefficients of balance={...}, route with noise (noisy=True) or by a router that balances by itself"
    " (moe_heads.routers.BiasBalancedRouter, ExpertChoiceRouter), or lower the learning rate of the router.",
    "Noise on the router, dropout or batch statistics give them work in training: raise the coefficients of"
    " balance={...}, or route without noise (noisy=False), so that the balance is that of evaluation.",
)
_SOFT = Remedies(
    "Raise the temperature or the coefficient of balance={'kl': ...}, or lower the learning rate.",
    "Dropout or batch statistics give them weight in training: raise the temperature or the coefficient of"
    " balance={'kl': ...}.",
)
_BIAS_BALANCED = Remedies(
    "Raise the update_rate of the router's bias, or lower the learning rate of the router.",
    "Dropout or batch statistics give them work in training: lessen the dropout before the router, or train on larger"
    " batches.",
)
_FOREIGN = Remedies(
    "Raise the coefficient of its balance loss, add noise to its logits in training, or lower its learning rate.",
    "Noise on the router, dropout or batch statistics give them work in training: raise the coefficient of its balance"
    " loss, or lessen the noise.",
)
_FOREIGN_SOFT = Remedies(
    "Raise its temperature, add a loss that evens out its mean weights, or lower its learning rate.",
    "Noise, dropout or batch statistics give them weight in training: lessen them, or add a loss that evens out its"
    " mean weights.",
)


def remedies_for(router: nn.Module, soft: bool) -> Remedies:
    """Advice in terms of what can be set on this router.

    Args:
        router: The router; one that is not of this package has options that are not known.
        soft: Whether it mixes all experts.
    """
    if not isinstance(router, Router):
        return _FOREIGN_SOFT if soft else _FOREIGN
    if isinstance(router, BiasBalancedRouter):
        return _BIAS_BALANCED
    return _SOFT if soft else _SPARSE

"""What is known of the heads with a router: which they are, their arithmetic, and the name of their dense twin."""

from collections.abc import Mapping

from torch import Tensor, nn

from moe_heads.callbacks.functional.common.batches import leaves_of
from moe_heads.callbacks.functional.timing.calls import Call
from moe_heads.head import Head
from moe_heads.routing import Router

__all__ = ["active_flops", "routed_heads", "twin_name"]


def routed_heads(named: Mapping[str, nn.Module]) -> dict[str, Head]:
    """The heads of this package that own a router."""
    return {
        name: module
        for name, module in named.items()
        if isinstance(module, Head) and any(isinstance(child, Router) for child in module.children())
    }


def twin_name(head: str) -> str:
    """Name of the rows of the dense head that stands beside a head."""
    return f"{head}_dense"


def active_flops(head: Head, call: Call) -> int:
    """Theoretical operations of the call of a head, of the experts that are chosen alone."""
    x = _input(call)
    return head.flops(x.shape[0], x.shape[1] if x.dim() == 3 else 1).active


def _input(call: Call) -> Tensor:
    return next(leaf for leaf in leaves_of([call.args, dict(call.kwargs)]) if isinstance(leaf, Tensor))

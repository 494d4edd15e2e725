"""Collect what the routers inside any model do."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from moe_heads.modes import in_backward
from moe_heads.routing.router import Router
from moe_heads.routing.routing import Routing
from moe_heads.routing.stats import RoutingStats

__all__ = ["RoutingCollection", "collect_routing", "named_routers"]


class RoutingCollection:
    """What the routers of a model did while `collect_routing` was active.

    Attributes:
        routings: The `Routing` of every forward pass, by the name of the head that owns the router ("head" when the
            model is itself the head).
    """

    def __init__(self) -> None:
        self.routings: dict[str, list[Routing]] = {}

    def _warn_if_nothing_was_seen(self) -> None:
        if self.routings and not any(self.routings.values()):
            warnings.warn(
                f"collect_routing: none of the routers {list(self.routings)} ran inside the block. A model that was"
                " compiled before does not call forward hooks: use head(x, return_routing=True) inside it instead",
                stacklevel=3,
            )

    @property
    def aux_loss(self) -> Tensor:
        """Sum of the balance losses of all heads and passes, scalar; zero for a model without a router.

        Under DDP a training pass sums over the ranks here: every rank has to read it. Through a checkpoint with
        ``use_reentrant=True`` it has no gradient; use ``use_reentrant=False``.
        """
        self._warn_if_nothing_was_seen()
        losses = [routing.aux_loss for routings in self.routings.values() for routing in routings]
        return torch.stack(losses).sum() if losses else torch.zeros(())

    @property
    def stats(self) -> dict[str, RoutingStats]:
        """Statistics of each head, summed over the passes."""
        self._warn_if_nothing_was_seen()
        return {name: _total([r.stats() for r in routings]) for name, routings in self.routings.items() if routings}


@contextmanager
def collect_routing(model: nn.Module) -> Iterator[RoutingCollection]:
    """Collect what the routers inside ``model`` do while the block runs.

    Works by forward hooks on the routers, removed when the block ends, however it ends: no global state, and the
    model keeps nothing of the batch.

    Args:
        model: Any module; heads may sit at any depth.

    Yields:
        The collection, filled by the forward passes inside the block.

    Example:
        >>> import torch
        >>> from moe_heads import SparseMoE, collect_routing
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), SparseMoE(16, 3, num_experts=4, expert_width=8))
        >>> with collect_routing(model) as routing:
        ...     logits = model(torch.randn(5, 4))
        >>> routing.stats["1"].counts.sum()
        tensor(10)
        >>> routing.aux_loss.requires_grad
        True
    """
    collection = RoutingCollection()
    with ExitStack() as stack:
        for name, router in named_routers(model).items():
            recorded = collection.routings[name] = []
            stack.callback(router.register_forward_hook(_recorder(recorded)).remove)
        yield collection


def named_routers(model: nn.Module) -> dict[str, Router]:
    """The routers inside a model, each by the name under which `RoutingCollection` has its passes."""
    named: dict[str, Router] = {}
    for path, module in model.named_modules():
        if isinstance(module, Router):
            owner = path.rpartition(".")[0] or "head"
            # a module with two routers: the second goes by its own name
            named[path if owner in named else owner] = module
    return named


def _recorder(recorded: list[Routing]) -> Callable[[nn.Module, object, Routing], None]:
    def record(module: nn.Module, args: object, output: Routing) -> None:
        # gradient checkpointing runs a pass once more in backward: the same rows, not new ones
        if not in_backward():
            recorded.append(output)

    return record


def _total(stats: list[RoutingStats]) -> RoutingStats:
    total = stats[0]
    for more in stats[1:]:
        total = total + more
    return total

"""Collect what the routers inside any model do."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.modes import in_backward
from moe_heads.routing.adapters import Adapters, RoutingAdapter, adapted_routers, named_routers
from moe_heads.routing.routing import Routing
from moe_heads.routing.stats import RoutingStats

__all__ = ["RoutingCollection", "collect_routing"]


class RoutingCollection:
    """What the routers of a model did while `collect_routing` was active.

    Attributes:
        paused: Whether forward passes are let by for now; by default not. Cheaper than to leave the block and enter it
            again, for which torch.compile would compile the model anew.
    """

    def __init__(self) -> None:
        self.paused = False
        self._recorders: dict[str, _Recorder] = {}
        self._routings: dict[str, list[Routing]] = {}

    @property
    def routings(self) -> dict[str, list[Routing]]:
        """The `Routing` of every forward pass, by the name of the head that owns the router.

        The name is "head" when the model is itself the head; routers that share an owner go by their own names. The
        lists are the collection's own: what is taken out of them is forgotten.
        """
        for name, recorder in self._recorders.items():
            self._routings.setdefault(name, []).extend(recorder.taken())
        return self._routings

    def _end(self) -> None:
        """Hold what was recorded and no recorder, which holds the collection: a circle would keep graphs alive."""
        self._routings, self._recorders = self.routings, {}

    def _warn_if_nothing_was_seen(self) -> None:
        routings = self.routings
        if routings and not any(routings.values()):
            warnings.warn(
                f"collect_routing: none of the routers {list(routings)} ran inside the block. A model that was"
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
def collect_routing(model: nn.Module, adapters: Adapters | None = None) -> Iterator[RoutingCollection]:
    """Collect what the routers inside ``model`` do while the block runs.

    Works by forward hooks on the routers, removed when the block ends, however it ends: no global state, and the
    model keeps nothing of the batch.

    Args:
        model: Any module; heads may sit at any depth.
        adapters: For routers that are not of this package: ``adapter(module, args, output) -> Routing`` by the class of
            the router or by its name in the model ("layers.*.gate"); see `Routing.from_probs`.

    Yields:
        The collection, filled by the forward passes inside the block.

    Raises:
        ValueError: If an adapter fits no module, or gives no `Routing`.

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

        A router of somebody else, which is a linear layer of the model:

        >>> def adapter(module, args, logits):
        ...     return Routing.from_probs(logits.softmax(-1), logits.topk(2).indices)
        >>> gate = torch.nn.Linear(4, 8)
        >>> with collect_routing(torch.nn.Sequential(gate), {"0": adapter}) as routing:
        ...     _ = gate(torch.randn(5, 4))
        >>> routing.stats["head"].counts.sum()
        tensor(10)
    """
    collection = RoutingCollection()
    watched: dict[str, tuple[nn.Module, RoutingAdapter | None]] = {
        n: (r, None) for n, r in named_routers(model).items()
    }
    watched |= adapted_routers(model, adapters)
    with ExitStack() as stack:
        for name, (router, adapter) in watched.items():
            recorder = collection._recorders[name] = _Recorder(name, collection, adapter)
            stack.callback(router.register_forward_hook(recorder).remove)
        try:
            yield collection
        finally:
            collection._end()


class _Link:
    """A routing, and the link before it. A list would do, but torch.compile compiles anew for each of its lengths."""

    def __init__(self, routing: Routing | None, before: "_Link | None") -> None:
        self.routing, self.before = routing, before


class _Recorder:
    """Forward hook that records what a router decided.

    A copy of the module (averaged weights, a saved model) records nothing: it is not the model that is watched.
    """

    def __init__(self, name: str, collection: RoutingCollection | None, adapter: RoutingAdapter | None) -> None:
        self._name, self._collection, self._adapter = name, collection, adapter
        self._last = _Link(None, None)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        collection = self._collection
        # gradient checkpointing runs a pass once more in backward: the same rows, not new ones
        if collection is not None and not collection.paused and not in_backward():
            self._last = _Link(self._routing(module, args, output), self._last)

    def taken(self) -> list[Routing]:
        """What was recorded since the last time, the oldest first."""
        found: list[Routing] = []
        link: _Link | None = self._last
        while link is not None and link.routing is not None:
            found.append(link.routing)
            link = link.before
        self._last = _Link(None, None)
        return found[::-1]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Recorder, (self._name, None, None)

    def _routing(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Routing:
        try:
            routing = output if self._adapter is None else self._adapter(module, args, output)
        except Exception as error:
            error.add_note(f"adapters: raised by the adapter of router {self._name!r}, a {type(module).__name__}")
            raise
        if isinstance(routing, Routing):
            return routing
        raise ValueError(
            f"adapters: expected a moe_heads.Routing of router {self._name!r}, got {type(routing).__name__}: build one"
            " with Routing.from_probs"
        )


def _total(stats: list[RoutingStats]) -> RoutingStats:
    total = stats[0]
    for more in stats[1:]:
        total = total + more
    return total

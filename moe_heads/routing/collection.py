"""Collection of the decisions of the routers inside any model."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.modes import in_backward
from moe_heads.routing.adapters import Adapters, RoutingAdapter, adapted_routers, named_routers
from moe_heads.routing.padding import MaskHook, check_mask, mask_of_rows, mask_of_tokens, masked_modules
from moe_heads.routing.recognition.expert_layers import expert_layers
from moe_heads.routing.recognition.observed import Pass, UnknownDecisionError
from moe_heads.routing.recognition.recognized import Recognized
from moe_heads.routing.routing import Routing
from moe_heads.routing.stats import RoutingStats

__all__ = ["RoutingCollection", "collect_routing"]


class RoutingCollection:
    """Decisions of the routers of a model while `collect_routing` was active.

    Attributes:
        paused: Whether forward passes are ignored for now. False by default. Pausing is cheaper than leaving the block
            and entering it again, which would make torch.compile recompile the model.
        skips_evaluation: Whether passes in evaluation mode or without gradients are ignored. False by default.
        keeps_errors: Whether the error of an adapter is kept in `errors` instead of raised. The router is left out from
            then on. False by default.
        errors: Errors of adapters, by the name of the router, and of routers that were recognized but whose decisions
            cannot be read.
    """

    def __init__(self) -> None:
        self.paused = self.skips_evaluation = self.keeps_errors = False
        self.errors: dict[str, Exception] = {}
        self._recorders: dict[str, _Recorder] = {}
        self._routings: dict[str, list[Routing]] = {}
        # layers of experts, each with the names of the recorders inside it
        self._layers: dict[str, tuple[nn.Module, frozenset[str]]] = {}

    def restart(self) -> None:
        """Forget the passes so far, and record from now on."""
        for passes in self.routings.values():
            passes.clear()
        self.paused = False

    @property
    def routings(self) -> dict[str, list[Routing]]:
        """The `Routing` of every forward pass, by the name of the head that contains the router.

        The name is "head" when the model is itself the head. Routers that share a parent module have their own names.
        The lists are not copies: a routing that is removed from them is no longer part of the collection.
        """
        for name, recorder in self._recorders.items():
            taken = recorder.taken()
            if taken or recorder.is_router:
                self._routings.setdefault(name, []).extend(taken)
        return self._routings

    @property
    def misfits(self) -> dict[str, str]:
        """Entries of the registry that do not fit the router that they were found for, by the name of the router."""
        return {name: adapter.misfit for name, adapter in self._recognized() if adapter.misfit}

    @property
    def only_here(self) -> dict[str, str]:
        """Reasons why decisions are known for this process alone, by the name of the router."""
        return {name: adapter.only_here for name, adapter in self._recognized() if adapter.only_here}

    @property
    def unrecognized(self) -> dict[str, nn.Module]:
        """Layers that look like mixtures of experts and whose router is not known, by path, after they ran."""
        unknown = {name for name, recorder in self._recorders.items() if recorder.is_unknown}
        return {path: layer for path, (layer, inside) in self._layers.items() if inside <= unknown}

    def _recognized(self) -> Iterator[tuple[str, Recognized]]:
        for name, recorder in self._recorders.items():
            if isinstance(recorder.adapter, Recognized):
                yield name, recorder.adapter

    def _end(self) -> None:
        """Keep the routings, and let the recorders go of the collection: a cycle would keep graphs alive."""
        self._routings = self.routings
        for recorder in self._recorders.values():
            recorder.end()

    def _warn_if_nothing_ran(self) -> None:
        routings = {name: passes for name, passes in self.routings.items() if name not in self.errors}
        if routings and not any(routings.values()):
            warnings.warn(
                f"collect_routing: expected a forward pass of the routers {list(routings)} inside the block, got none."
                " If the model was compiled before, it does not call forward hooks: use head(x, return_routing=True)"
                " inside it instead.",
                stacklevel=3,
            )

    @property
    def aux_loss(self) -> Tensor:
        """Sum of the balance losses of all heads and passes, scalar. Zero for a model without a router.

        Under DDP a training pass sums over the ranks here, so every rank must read it. It has no gradient through
        gradient checkpointing with ``use_reentrant=True``. Use ``use_reentrant=False``.
        """
        self._warn_if_nothing_ran()
        losses = [routing.aux_loss for routings in self.routings.values() for routing in routings]
        return torch.stack(losses).sum() if losses else torch.zeros(())

    @property
    def stats(self) -> dict[str, RoutingStats]:
        """Statistics of each head, summed over the passes."""
        self._warn_if_nothing_ran()
        return {name: _total([r.stats() for r in routings]) for name, routings in self.routings.items() if routings}


@contextmanager
def collect_routing(
    model: nn.Module, adapters: Adapters | None = None, *, mask: Tensor | None = None
) -> Iterator[RoutingCollection]:
    """Collect the decisions of the routers inside ``model`` while the block runs.

    The collection uses forward hooks on the routers, which are removed when the block ends, also after an error. There
    is no global state, and the model keeps nothing of the batch.

    Args:
        model: Any module. Heads may be nested at any depth.
        adapters: For third-party routers: ``adapter(module, args, output) -> Routing`` by the class of the router or
            by its name in the model ("layers.*.gate"). They run without gradients. See `Routing.from_probs`.
        mask: Tokens that are real, (B, T), bool. The others are padding. The mask reaches every head, layer and router
            of this package that runs on tokens (B, T, D) or on their rows (B·T, D) inside the block, as if it was
            passed to their call: padding changes no logit, no balance loss and no statistic. Heads on pooled features
            (B, D) run as usual. Rows of a third-party router that are padding are left out of its statistics. With
            gradient checkpointing, call backward inside the block, since its second pass needs the mask as well.

    Yields:
        The collection, filled by the forward passes inside the block.

    Raises:
        ValueError: If an adapter matches no module, or returns no `Routing`, or the mask is not bool of two dimensions.
            In a pass, if the number of tokens differs from that of the mask, or a router does not take a mask.

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

        A third-party router, here a linear layer of the model:

        >>> def adapter(module, args, logits):
        ...     return Routing.from_probs(logits.softmax(-1), logits.topk(2).indices)
        >>> gate = torch.nn.Linear(4, 8)
        >>> with collect_routing(torch.nn.Sequential(gate), {"0": adapter}) as routing:
        ...     _ = gate(torch.randn(5, 4))
        >>> routing.stats["head"].counts.sum()
        tensor(10)
    """
    hooked: dict[str, tuple[nn.Module, RoutingAdapter | Recognized | None]] = {
        **{name: (router, None) for name, router in named_routers(model).items()},
        **adapted_routers(model, adapters),
    }
    collection = RoutingCollection()
    for path, layer in expert_layers(model).items():
        inside = set(layer.modules())
        names = frozenset(name for name, (router, _) in hooked.items() if router in inside)
        collection._layers[path] = layer, names
    with ExitStack() as stack:
        mask_hooks: list[MaskHook] = []
        if mask is not None:
            check_mask(mask)
            for name, module in masked_modules(model).items():
                mask_hooks.append(MaskHook(name, mask))
                stack.callback(module.register_forward_pre_hook(mask_hooks[-1], with_kwargs=True).remove)
        for name, (router, adapter) in hooked.items():
            recorder = collection._recorders[name] = _Recorder(name, collection, adapter, mask)
            takes_kwargs = isinstance(adapter, Recognized)
            stack.callback(router.register_forward_hook(recorder, with_kwargs=takes_kwargs).remove)
        try:
            yield collection
            if mask_hooks and not any(hook.was_called for hook in mask_hooks):
                warnings.warn(
                    "collect_routing: expected a forward pass of the heads, layers or routers that take the mask"
                    " inside the block, got none, so the mask had no effect. If the model was compiled before, it does"
                    " not call forward hooks: pass the mask to the head inside it, or compile it in a block with a"
                    " mask.",
                    stacklevel=3,
                )
        finally:
            collection._end()


class _Link:
    """Linked list of routings. A plain list would make torch.compile recompile for each of its lengths."""

    def __init__(self, routing: Routing | None, before: "_Link | None") -> None:
        self.routing, self.before = routing, before


class _Recorder:
    """Forward hook that records the decisions of a router.

    A copy of the module (averaged weights, a saved model) records nothing, because it is not the collected model.
    """

    def __init__(
        self,
        name: str,
        collection: RoutingCollection | None,
        adapter: RoutingAdapter | Recognized | None,
        mask: Tensor | None = None,
    ) -> None:
        self._name, self._collection, self.adapter, self._mask = name, collection, adapter, mask
        self._last = _Link(None, None)
        self._has_failed = self._has_run = False
        # whether a module that may be a router ran and is none
        self.is_unknown = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        collection = self._collection
        # gradient checkpointing repeats a pass in backward: the same rows, not new ones
        if collection is None or collection.paused or self._has_failed or in_backward():
            return
        if collection.skips_evaluation and not (module.training and torch.is_grad_enabled()):
            return
        output = rest[-1]
        if self.adapter is None:
            self._last = _Link(self._checked(output), self._last)
            return
        try:
            # what an adapter computes has no gradient: gradient checkpointing would miss it in its second pass
            with torch.no_grad():
                routing = self._adapted(module, args, *rest)
        except Exception as error:
            if not collection.keeps_errors and not isinstance(error, UnknownDecisionError):
                raise
            self._has_failed = True
            collection.errors[self._name] = error
        else:
            # one pass in another form does not make a router unknown
            self.is_unknown = routing is None and not self._has_run
            if routing is not None:
                self._has_run = True
                self._last = _Link(routing, self._last)

    def end(self) -> None:
        """Record nothing from now on."""
        self._collection = None

    @property
    def is_router(self) -> bool:
        """True if the module is known to be a router before it runs."""
        return not isinstance(self.adapter, Recognized) or self.adapter.is_registered

    def taken(self) -> list[Routing]:
        """Return the routings recorded since the last call, the oldest first."""
        found: list[Routing] = []
        link: _Link | None = self._last
        while link is not None and link.routing is not None:
            found.append(link.routing)
            link = link.before
        self._last = _Link(None, None)
        return found[::-1]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Recorder, (self._name, None, None)

    def _adapted(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Routing | None:
        adapter = self.adapter
        assert adapter is not None
        if isinstance(adapter, Recognized):
            routing = adapter(Pass(module, args, rest[0], rest[1]))
        else:
            try:
                routing = self._checked(adapter(module, args, rest[-1]))
            except Exception as error:
                error.add_note(f"adapters: raised by the adapter of router {self._name!r}, a {type(module).__name__}")
                raise
        if routing is None or self._mask is None or routing.mask is not None:
            return routing
        of_tokens = mask_of_tokens(self._mask, routing)
        of_rows = mask_of_rows(self._mask, len(routing.logits), self._name) if of_tokens is None else of_tokens
        return replace(routing, mask=of_rows)

    def _checked(self, routing: Any) -> Routing:
        if isinstance(routing, Routing):
            return routing
        raise ValueError(
            f"adapters: expected a moe_heads.Routing of router {self._name!r}, got {type(routing).__name__}. Build one"
            " with Routing.from_probs."
        )


def _total(stats: list[RoutingStats]) -> RoutingStats:
    total = stats[0]
    for more in stats[1:]:
        total = total + more
    return total

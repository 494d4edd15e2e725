"""Notes about routers of a model whose decisions are not known, or only in part. Each one is given once."""

from collections.abc import Mapping

from torch import nn

from moe_heads.analysis.expert_utilization.token_masks import TokenMasks
from moe_heads.routing import RoutingCollection, RoutingStats
from moe_heads.routing.recognition.expert_layers import shown_adapter
from moe_heads.routing.recognition.recognized import Recognized

__all__ = ["RouterNotes", "UnknownRouterWarning"]

_MAX_NAMED = 4


class UnknownRouterWarning(UserWarning):
    """Warning that the decisions of a router are not known, or only in part."""


class RouterNotes:
    """Notes about the routers of a model.

    Args:
        adapters: Adapter of each router of another package, by name.
    """

    def __init__(self, adapters: Mapping[str, object]) -> None:
        self._adapters = adapters
        self._reported: set[str] = set()

    def after_pass(self, collection: RoutingCollection, masks: TokenMasks) -> list[str]:
        """Return what the passes so far showed.

        Routers that are left out, entries that do not fit, decisions of this process alone, layers without a known
        router, and masks that fit no router.

        Args:
            collection: Collection that watched them.
            masks: The masks that were used.
        """
        found: dict[str, str] = {}
        for name, error in collection.errors.items():
            found[f"error {name}"] = (
                f"the decisions of router {name!r} cannot be read, so it is left out from now on:"
                f" {type(error).__name__}: {error}"
            )
        for name, misfit in collection.misfits.items():
            found[f"misfit {name}"] = (
                f"router {name!r} is read by the shapes of its output alone, without entropy and margin: {misfit}"
            )
        for name, reason in collection.only_here.items():
            found[f"here {name}"] = (
                f"the numbers of router {name!r} are those of each process alone, because {reason}, and it is not known"
                " how the processes add up. Logged are those of rank zero."
            )
        for about, reason in masks.unused.items():
            found[f"mask {about}"] = (
                f"{reason}, so padding counts. Pass mask_fn=lambda batch: ..., which returns a mask of the tokens,"
                " (B, T), True for real ones, or None."
            )
        layers = collection.unrecognized
        if layers:
            found[f"layers {sorted(layers)}"] = self._of_unrecognized(layers)
        return self._new(found)

    def after_count(self, name: str, stats: RoutingStats) -> list[str]:
        """Return that the margin of a router is unknown although its scores are known, if that is so."""
        if not bool(stats.margin_sum.isnan()) or not bool(stats.entropy_sum.isfinite()):
            return []
        adapter = self._adapters.get(name)
        remedy = "Let the adapter pass scores= to Routing.from_probs."
        if isinstance(adapter, Recognized):
            remedy = f"This version of {adapter.owner} is not known: pass an adapter of your own."
        text = (
            f"in some rows of router {name!r}, the chosen experts are not those with the highest scores. Other scores"
            f" decide, so the margin is unknown. {remedy}"
        )
        return self._new({f"margin {name}": text})

    def _new(self, found: dict[str, str]) -> list[str]:
        new = {key: text for key, text in found.items() if key not in self._reported}
        self._reported |= set(new)
        return list(new.values())

    def _of_unrecognized(self, layers: dict[str, nn.Module]) -> str:
        named = [f"{path or 'the model'!r} ({type(layer).__name__})" for path, layer in layers.items()]
        shown = ", ".join(named[:_MAX_NAMED]) + (f" and {len(named) - _MAX_NAMED} more" * (len(named) > _MAX_NAMED))
        path, layer = next(iter(layers.items()))
        return (
            f"expected routers that are known, but {len(named)} layers look like mixtures of experts whose router is"
            f" not: {shown}. They are left out. Pass an adapter for the gate, such as\n"
            f"{shown_adapter(path, layer)}"
        )

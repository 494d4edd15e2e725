"""Messages about the routers of a model whose decisions are not known, or only in part: each one is given once."""

from torch import nn

from moe_heads.routing import RoutingCollection, RoutingStats
from moe_heads.routing.recognition.expert_layers import shown_adapter

__all__ = ["RouterMessages"]

_MAX_NAMED = 4


class RouterMessages:
    """Messages about the routers that a collection watches.

    Args:
        collection: The collection.
        entrance: Call that takes adapters, for the example in a message: "ExpertUtilizationCallback(".
    """

    def __init__(self, collection: RoutingCollection, entrance: str) -> None:
        self._collection, self._entrance = collection, entrance
        self._reported: set[str] = set()

    def after_pass(self) -> list[str]:
        """Return what the passes so far showed: routers left out, entries that do not fit, layers without a router."""
        found: dict[str, str] = {}
        for name, error in self._collection.errors.items():
            found[f"error {name}"] = (
                f"the decisions of router {name!r} cannot be read, so it is left out from now on:"
                f" {type(error).__name__}: {error}"
            )
        for name, misfit in self._collection.misfits.items():
            found[f"misfit {name}"] = (
                f"router {name!r} is read by the shapes of its output alone, without entropy and margin: {misfit}"
            )
        layers = self._collection.unrecognized
        if layers:
            found[f"layers {sorted(layers)}"] = self._of_unrecognized(layers)
        return self._new(found)

    def after_count(self, stats: dict[str, RoutingStats]) -> list[str]:
        """Return what the statistics showed: margins that are unknown although the scores of the experts are not."""
        return self._new({
            f"margin {name}": (
                f"router {name!r} did not choose the experts with its highest scores in every row, so other scores"
                f" decide and its margin is unknown. {self._collection.remedy_for_scores(name)}"
            )
            for name, of_router in stats.items()
            if bool(of_router.margin_sum.isnan()) and bool(of_router.entropy_sum.isfinite())
        })

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
            f"{shown_adapter(path, layer, self._entrance)}"
        )

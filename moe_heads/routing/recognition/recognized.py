"""Adapters of the routers that are recognized without one from the user."""

from typing import Any

from torch import Tensor, nn

from moe_heads.modes import can_read_values
from moe_heads.routing.recognition.expert_layers import all_expert_layers, is_gate_like
from moe_heads.routing.recognition.observed import Pass, UnknownDecisionError
from moe_heads.routing.recognition.registry import Entry, entry_of, inner_entries
from moe_heads.routing.recognition.scores import ScoreRule
from moe_heads.routing.recognition.shapes import decisions_in, routing_by_shape
from moe_heads.routing.recognition.shards import experts_of_this_process, has_processes, on_this_process
from moe_heads.routing.routing import Routing

__all__ = ["Recognized", "recognized_routers"]


class Recognized:
    """Adapter of a router that is recognized by its class or by the shapes of its output.

    Args:
        module: The router.
        entry: Its entry in the registry. None for a module that may be a router: it is one if its output has the form.
        experts: Its experts, if they are in a module of their own.

    Attributes:
        owner: Name of the router's class.
        is_registered: Whether it has an entry.
        misfit: Why the entry does not fit the router, which is then read by its shapes alone. Empty if it fits.
        only_here: Why its decisions are known only for the tokens, or the experts, of this process. Empty otherwise.
    """

    def __init__(self, module: nn.Module, entry: Entry | None, experts: nn.Module | None = None) -> None:
        self._entry, self.is_registered, self.misfit, self.only_here = entry, entry is not None, "", ""
        self.owner, self._experts = type(module).__name__, experts
        self._num_here: int | None = None
        self._are_shares: bool | None = None

    def __call__(self, seen: Pass) -> Routing | None:
        """Return the routing of a pass, or None if the module is no router.

        Raises:
            UnknownDecisionError: If the entry does not fit, and the shapes do not show the decisions either.
        """
        try:
            seen, reason = on_this_process(seen)
            if reason:
                self.only_here = reason
            return self._of_this_process(seen) or self._by_entry(seen) or self._by_shape(seen)
        except UnknownDecisionError as error:
            raise UnknownDecisionError(f"{self.owner}: {error}. {_shapes_of(seen.output)}") from error

    def _by_entry(self, seen: Pass) -> Routing | None:
        if self._entry is None or self.misfit:
            return None
        try:
            if not isinstance(self._entry, ScoreRule):
                return self._entry(seen)
            found = decisions_in(seen)
            if found is None or found.logits is None:
                raise UnknownDecisionError("it does not return (logits, weights, indices)")
            return self._entry.routing(seen, found.logits, found.choices, found.weights)
        except UnknownDecisionError:
            raise
        except Exception as error:
            self.misfit = (
                f"the entry of {self.owner} does not fit this version: {type(error).__name__}: {error}."
                f" {_shapes_of(seen.output)}"
            )
            routing = self._by_shape(seen)
            if routing is None:
                raise UnknownDecisionError(self.misfit) from error
            return routing

    def _by_shape(self, seen: Pass) -> Routing | None:
        found = decisions_in(seen)
        if found is None:
            return None
        # what a router is does not change from pass to pass
        if self._are_shares is None and can_read_values(found.weights):
            self._are_shares = not bool((found.weights < 0).any())
            if not self._are_shares:
                self.misfit = self.misfit or "its weights are negative, so every choice counts alike as importance"
        return routing_by_shape(found, with_weights=self._are_shares is not False)

    def _of_this_process(self, seen: Pass) -> Routing | None:
        """Return the routing among the experts of this process, or None if the router numbers all experts."""
        if self._experts is None or not has_processes():
            return None
        found = decisions_in(seen)
        if found is None:
            return None
        if self._num_here is None:
            self._num_here = experts_of_this_process(self._experts, found.choices, found.weights, found.num_experts)
            if self._num_here is None:
                return None
            self.only_here = f"it numbers the {self._num_here} experts of this process, of {found.num_experts}"
        choices = found.choices.masked_fill(found.choices >= self._num_here, -1)
        return Routing.from_choices(choices, self._num_here, found.weights.float())


def recognized_routers(model: nn.Module, taken: set[nn.Module]) -> dict[str, tuple[nn.Module, Recognized]]:
    """Return the modules whose decisions may be recognized, by path, without those that are already known.

    Args:
        model: The model.
        taken: Routers of this package and modules with an adapter of the user. A layer that has one of them as a child
            is not searched.
    """
    layers = all_expert_layers(model)
    # the layers around a known router: what else they have is not asked
    known = {path.rpartition(".")[0] for path, module in model.named_modules() if path and module in taken}
    found: dict[str, tuple[nn.Module, Recognized]] = {}
    for path, module in model.named_modules():
        if module in taken or path in known or (path and path.rpartition(".")[0] in known):
            continue
        for inner, entry in inner_entries(module).items():
            child = module.get_submodule(inner)
            found[f"{path}.{inner}" if path else inner] = child, Recognized(child, entry)
        entry_here = entry_of(module)
        if path not in found and (entry_here is not None or is_gate_like(path, module, layers)):
            owner = model.get_submodule(path.rpartition(".")[0])
            found[path] = module, Recognized(module, entry_here, getattr(owner, "experts", None))
    return _without_inner(found)


def _without_inner(
    found: dict[str, tuple[nn.Module, Recognized]],
) -> dict[str, tuple[nn.Module, Recognized]]:
    """Drop modules without an entry inside, or around, a router with an entry, which reports the same choices."""
    registered = [path for path, (_, adapter) in found.items() if adapter.is_registered]

    def repeats(path: str) -> bool:
        return any(path.startswith(f"{other}.") or other.startswith(f"{path}.") for other in registered)

    return {path: pair for path, pair in found.items() if pair[1].is_registered or not repeats(path)}


def _shapes_of(output: Any) -> str:
    values = output if isinstance(output, (tuple, list)) else (output,)
    shapes = [f"{tuple(v.shape)} {v.dtype}" if isinstance(v, Tensor) else type(v).__name__ for v in values]
    return f"It returned {', '.join(shapes)}".replace("torch.", "")

"""Discovery of the routers inside any model: those of this package, those with an adapter, and those recognized."""

from collections import Counter
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from moe_heads.routing.recognition.recognized import Recognized, recognized_routers
from moe_heads.routing.router import Router
from moe_heads.routing.routing import Routing

__all__ = ["Adapters", "RoutingAdapter", "adapted_routers", "named_routers"]

_MAX_NAMED = 8  # module names in a message

M = TypeVar("M", bound=nn.Module)

RoutingAdapter = Callable[[nn.Module, tuple[Any, ...], Any], Routing]
"""``adapter(module, args, output) -> Routing``: the decisions of a forward pass of a third-party router.

`Routing.from_probs` builds the `Routing` from probabilities and, for a sparse router, indices.
"""

Adapters = Mapping[type[nn.Module] | str, RoutingAdapter]
"""Adapters by the class of the routers, or by their name in the model. ``*`` in a name matches anything."""


def named_routers(model: nn.Module) -> dict[str, Router]:
    """Return the routers of this package inside a model, by the name under which `RoutingCollection` lists them."""
    return _by_owner({path: module for path, module in model.named_modules() if isinstance(module, Router)}, set())


def adapted_routers(
    model: nn.Module, adapters: Adapters | None
) -> dict[str, tuple[nn.Module, RoutingAdapter | Recognized]]:
    """Return the third-party routers inside a model, by name, each with the first adapter that matches it.

    Routers without an adapter are those that the registry knows, and modules that may turn out to be routers when they
    run.

    Args:
        model: The model.
        adapters: Adapters by class or name.

    Raises:
        ValueError: If a key is neither a module class nor a name, matches no module, or matches a router of this
            package.
    """
    if adapters is not None and not isinstance(adapters, Mapping):
        raise ValueError(f"adapters: expected a mapping from classes or names to adapters, got {adapters!r}.")
    found: dict[str, nn.Module] = {}
    chosen: dict[nn.Module, RoutingAdapter | Recognized] = {}
    for key, adapter in (adapters or {}).items():
        is_class = isinstance(key, type) and issubclass(key, nn.Module)
        if not (is_class or isinstance(key, str)) or not callable(adapter):
            raise ValueError(
                "adapters: expected adapter(module, args, output) by a module class or a name, got"
                f" {key!r}: {adapter!r}."
            )
        fitting = {path: module for path, module in model.named_modules() if _fits(key, path, module)}
        if not fitting:
            names = [path for path, _ in model.named_modules() if path]
            ending = [path for path in names if isinstance(key, str) and path.endswith(key.rpartition(".")[2])]
            raise ValueError(
                f"adapters: expected classes or names of modules inside the model, got {key!r}, which matches no"
                f" module. Use names such as {', '.join(map(repr, (ending or names)[:_MAX_NAMED]))} …"
            )
        if any(isinstance(module, Router) for module in fitting.values()):
            raise ValueError(
                f"adapters: expected modules that are not routers of moe_heads, got {key!r}, which matches some."
                " Routers of moe_heads need no adapter."
            )
        for path, module in fitting.items():
            if module not in chosen:
                found[path], chosen[module] = module, adapter
    own = named_routers(model)
    for path, (module, recognized) in recognized_routers(model, {*own.values(), *chosen}).items():
        found[path], chosen[module] = module, recognized
    named = _by_owner(found, set(own))
    return {name: (module, chosen[module]) for name, module in named.items()}


def _fits(key: type[nn.Module] | str, path: str, module: nn.Module) -> bool:
    return fnmatchcase(path, key) if isinstance(key, str) else isinstance(module, key)


def _by_owner(modules: Mapping[str, M], taken: set[str]) -> dict[str, M]:
    """Return the modules by the names of their parent modules. The name "head" denotes the model itself.

    Modules that share a parent, with each other or with a name in ``taken``, keep their own names.
    """
    owners = {path: path.rpartition(".")[0] or "head" for path in modules}
    num_owned = Counter(owners.values())
    by_own_name = {path for path, owner in owners.items() if num_owned[owner] > 1 or owner in taken}
    is_free = {path: path not in by_own_name and owner not in by_own_name for path, owner in owners.items()}
    return {owners[path] if is_free[path] else path: module for path, module in modules.items()}

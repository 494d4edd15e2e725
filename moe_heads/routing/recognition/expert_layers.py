"""Layers of a model that look like mixtures of experts: modules with a child of experts."""

import re

from torch import nn

from moe_heads.routing.router import Router

__all__ = ["all_expert_layers", "expert_layers", "is_gate_like", "shown_adapter"]

_EXPERTS = re.compile(r"expert", re.IGNORECASE)
_SHARED = re.compile(r"shared|common", re.IGNORECASE)
_GATE = re.compile(r"gate|router|gating|routing", re.IGNORECASE)
_ROUTER_CLASS = re.compile(r"Router|Top_?[KN\d]|MoE_?Gate|Gating")


def expert_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that have a gate and several experts in a child, by path, without layers inside an expert."""
    layers = all_expert_layers(model)
    inside = {
        f"{path}.{name}".lstrip(".")
        for path, layer in layers.items()
        for name, child in layer.named_children()
        if _is_expert_group(name, child)
    }
    outermost = {
        path: layer
        for path, layer in layers.items()
        if not any(path == experts or path.startswith(f"{experts}.") for experts in inside)
    }
    return {path: layer for path, layer in outermost.items() if not any(isinstance(m, Router) for m in layer.modules())}


def all_expert_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that have a gate and several experts in a child, by path, also inside of experts."""
    return {
        path: module
        for path, module in model.named_modules()
        if any(_is_expert_group(name, child) for name, child in module.named_children()) and any(_gates_of(module))
    }


def is_gate_like(path: str, module: nn.Module, layers: dict[str, nn.Module]) -> bool:
    """Return whether the output of a module may be the decisions of a router, by its class or its place."""
    if type(module).__module__.startswith("torch.") or isinstance(module, Router):
        return False
    owner, _, name = path.rpartition(".")
    cls = type(module).__name__
    if _ROUTER_CLASS.search(cls):
        return True
    return owner in layers and not _is_expert_group(name, module) and bool(_GATE.search(name) or _GATE.search(cls))


def shown_adapter(path: str, layer: nn.Module) -> str:
    """Return an adapter in three lines for the gate of a layer, to be completed by the user.

    Args:
        path: Path of the layer.
        layer: The layer.
    """
    modules, parameters = _gates_of(layer)
    k = next((n for n in (getattr(layer, name, None) for name in ("top_k", "topk", "k")) if isinstance(n, int)), 2)
    if modules:
        arguments, logits, watched = "module, args, logits", "", f"{path}.{modules[0]}"
    else:  # the layer multiplies by a parameter of its own
        arguments, logits, watched = "layer, args, output", f"logits = args[0] @ layer.{parameters[0]}", path
    name = re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", watched).strip(".")
    lines = [
        f"def adapter({arguments}):",
        *([f"    {logits}"] if logits else []),
        f"    return Routing.from_probs(logits.softmax(-1), logits.topk({k}).indices)",
        f"adapters = {{{name!r}: adapter}}",
    ]
    return "\n".join(f"    {line}" for line in lines)


def _gates_of(layer: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of what may be the gate of a layer: modules, and parameters of its own."""
    modules = [
        f"{name}.*" if isinstance(child, nn.ModuleList) else name
        for name, child in layer.named_children()
        if _GATE.search(name) and not _EXPERTS.search(name) and not _SHARED.search(name)
    ]
    return modules, [name for name, _ in layer.named_parameters(recurse=False) if _GATE.search(name)]


def _is_expert_group(name: str, module: nn.Module) -> bool:
    if not _EXPERTS.search(name) or _SHARED.search(name):
        return False
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return len(module) > 1 or _has_stacks(module)
    return _has_stacks(module) or any(
        _EXPERTS.search(inner) and isinstance(child, (nn.ModuleList, nn.ModuleDict)) and len(child) > 1
        for inner, child in module.named_children()
    )


def _has_stacks(module: nn.Module) -> bool:
    """Return whether a module has parameters of three dimensions: one matrix for each of several experts."""
    return any(p.dim() == 3 and p.shape[0] > 1 for p in module.parameters(recurse=False))

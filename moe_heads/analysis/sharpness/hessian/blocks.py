"""Blocks of parameters of a model and their places in the flat vector."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from moe_heads.analysis.sharpness.hessian.trace import Places
from moe_heads.experts import StackedLinear
from moe_heads.routing import Router

__all__ = ["default_blocks", "expert_places", "places_of"]

# Names of the blocks of a head by its children.
_LABELS = {"router": "router", "experts": "experts", "shared": "shared experts"}


def default_blocks(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Return names of parameters by block: backbone, router and experts with routers, otherwise the children.

    A model that consists of one child has the blocks of that child, and so on inwards. With several heads, the blocks
    of router, experts and shared experts start with the head's name. Other parts of a head form a block with the head's
    name.

    Args:
        model: The model.
        names: Names of the parameters, in their order.
    """
    heads, listed = _heads(model), list(names)
    blocks: dict[str, list[str]] = {}
    depth = _depth_of_branches(listed)
    for name in listed:
        block = _block_in_heads(name, heads) if heads else ".".join(name.split(".")[: depth + 1])
        blocks.setdefault(block, []).append(name)
    return blocks


def places_of(blocks: Mapping[str, Sequence[str]], slices: Mapping[str, slice]) -> dict[str, list[slice]]:
    """Return the places of blocks in the flat vector.

    Args:
        blocks: Names of parameters, or of modules for all of their parameters, by block.
        slices: Place of each parameter.

    Raises:
        ValueError: If a name matches no parameter or module, or a block has a parameter twice.
    """
    places: dict[str, list[slice]] = {}
    for block, members in blocks.items():
        found: list[str] = []
        for member in members:
            matches = [name for name in slices if name == member or name.startswith(f"{member}.")]
            if not matches:
                raise ValueError(
                    f"blocks: expected names of trainable parameters or of modules, such as {next(iter(slices))!r},"
                    f" got {member!r} in {block!r}"
                )
            found += matches
        twice = sorted({name for name in found if found.count(name) > 1})
        if twice:
            raise ValueError(f"blocks: expected each parameter once in a block, got {twice} twice in {block!r}")
        places[block] = _merged([slices[name] for name in found])
    return places


def expert_places(model: nn.Module, slices: Mapping[str, slice]) -> Places:
    """Return the places of each expert ("expert 0", "expert 1", ...) of heads with stacked experts."""
    heads = _heads(model)
    places: dict[str, list[slice]] = {}
    for path, num_experts in heads.items():
        prefix = f"{path}." if path else ""
        stacked = [n for n in slices if n.startswith(f"{prefix}experts.") and _is_stacked(model, n, num_experts)]
        for expert in range(num_experts if stacked else 0):
            name = f"{path} expert {expert}" if len(heads) > 1 else f"expert {expert}"
            places[name] = [_part(slices[parameter], expert, num_experts) for parameter in stacked]
    return places


def _depth_of_branches(names: list[str]) -> int:
    """Return the number of nested modules that each hold all parameters. The blocks are the children below them."""
    modules = [name.split(".")[:-1] for name in names]
    depth = 0
    while len({tuple(path[: depth + 1]) for path in modules}) == 1 and len(min(modules, key=len)) > depth + 1:
        depth += 1
    return depth


def _merged(places: list[slice]) -> list[slice]:
    """Return the same places with neighbors merged."""
    merged: list[slice] = []
    for place in sorted(places, key=lambda place: place.start):
        if merged and merged[-1].stop == place.start:
            merged[-1] = slice(merged[-1].start, place.stop)
        else:
            merged.append(place)
    return merged


def _heads(model: nn.Module) -> dict[str, int]:
    """Return the number of experts by the name of the module that owns a router."""
    return {
        path.rpartition(".")[0]: module.num_experts
        for path, module in model.named_modules()
        if isinstance(module, Router)
    }


def _block_in_heads(name: str, heads: Mapping[str, int]) -> str:
    for path in heads:
        prefix = f"{path}." if path else ""
        if name.startswith(prefix):
            part = name.removeprefix(prefix).partition(".")[0]
            label = _LABELS.get(part) or path.rpartition(".")[2] or "head"
            return f"{path} {label}" if len(heads) > 1 else label
    return "backbone"


def _is_stacked(model: nn.Module, name: str, num_experts: int) -> bool:
    """Return whether a parameter holds those of the experts one after the other."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, StackedLinear) or model.get_parameter(name).shape[:1] == (num_experts,)


def _part(place: slice, index: int, num_parts: int) -> slice:
    size = (place.stop - place.start) // num_parts
    return slice(place.start + index * size, place.start + (index + 1) * size)

"""Search for the experts that belong to a router, by the structure of the module that contains both.

Shapes: E experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from moe_heads.routing.recognition.shapes import stated_num_experts

__all__ = ["ExpertWeights", "UnknownExpertsError", "find_experts", "num_experts_of"]


class UnknownExpertsError(Exception):
    """Error raised if the experts of a router, or a quantity of them, cannot be known. The message is the reason."""


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """Experts of a router, and their weight matrices.

    Attributes:
        module: Module that holds all of them.
        members: The E modules, if each expert is a module of its own. Else empty, and the weights are stacked.
        matrices: Weight matrices by name: one tensor (E, O, I), or E tensors (O, I). Further dimensions belong to I.
            The order of O and I does not matter.
    """

    module: nn.Module
    members: tuple[nn.Module, ...]
    matrices: Mapping[str, Tensor | Sequence[Tensor]]

    def stack(self, name: str, start: int, stop: int) -> Tensor:
        """Return a matrix of the experts ``start`` to ``stop``, (stop - start, O, I), without its gradient."""
        found = self.matrices[name]
        part = found[start:stop]
        stacked = part if isinstance(part, Tensor) else torch.stack([matrix.detach() for matrix in part])
        return stacked.detach().flatten(2)


def num_experts_of(router: nn.Module) -> int | None:
    """Return the number of experts that a router states in an attribute, or None."""
    stated = stated_num_experts(router)
    if not stated and isinstance(router, nn.Linear):
        return router.out_features
    return stated[0] if stated else None


def find_experts(model: nn.Module, router: nn.Module, num_experts: int) -> ExpertWeights:
    """Find the experts of a router.

    They are searched in the smallest module that holds the router and other parameters. Experts are E modules of one
    class in a ``ModuleList`` or ``ModuleDict``, or parameters whose first of three or more dimensions is E. They have
    to be parameters of that module itself, or of the only one of its children that has "expert" in its name, in its
    class or in the class of its members. Children with "share" in their name are not searched. Biases are ignored.

    Args:
        model: Model that contains the router.
        router: The router.
        num_experts: E.

    Raises:
        UnknownExpertsError: If there is not exactly one such group of experts, the experts differ in shape, or the
            weights are sharded, quantized, parametrized or without data.

    Example:
        >>> from moe_heads import SparseMoE
        >>> head = SparseMoE(16, 3, num_experts=4, expert_width=8)
        >>> find_experts(head, head.router, 4).matrices["fc1.weight"].shape
        torch.Size([4, 8, 16])
    """
    block = _block_of(model, router)
    groups = list(_groups(block, router, num_experts))
    if len(groups) != 1:
        raise UnknownExpertsError(
            f"expected one group of {num_experts} experts next to the router in {type(block).__name__}, found"
            f" {len(groups)}"
        )
    _check_weights(groups[0])
    return groups[0]


def _block_of(model: nn.Module, router: nn.Module) -> nn.Module:
    """Return the smallest module that contains the router and parameters outside it."""
    path = next((path for path, module in model.named_modules() if module is router), None)
    of_router = set(router.parameters())
    while path:
        path = path.rpartition(".")[0]
        block = model.get_submodule(path)
        if any(parameter not in of_router for parameter in block.parameters()):
            return block
    raise UnknownExpertsError("no module of the model contains the router and its experts")


def _groups(block: nn.Module, router: nn.Module, num_experts: int) -> Iterator[ExpertWeights]:
    """Yield the groups of experts among the parameters and the children of a block."""
    own = {name: p for name, p in block.named_parameters(recurse=False) if _is_stack(p, num_experts)}
    if own:
        yield ExpertWeights(block, (), own)
    for name, child in block.named_children():
        if _is_shared(name) or any(module is router for module in child.modules()):
            continue
        members = _members(child, num_experts)
        if _says_expert(name, child) or (members and _says_expert("", members[0])):
            yield from _groups_inside(child, num_experts)


def _groups_inside(root: nn.Module, num_experts: int) -> Iterator[ExpertWeights]:
    """Yield the groups of experts in a child of the block that has the name of experts."""
    containers: list[tuple[nn.Module, ...]] = []
    stacks: dict[str, Tensor] = {}
    others: list[str] = []

    def search(module: nn.Module, prefix: str) -> None:
        if members := _members(module, num_experts):
            containers.append(members)
            return
        for name, parameter in module.named_parameters(recurse=False):
            if _is_stack(parameter, num_experts):
                stacks[prefix + name] = parameter
            elif parameter.dim() > 1 and len(parameter) != num_experts:  # (E, O) is a bias
                others.append(prefix + name)
        for name, child in module.named_children():
            if not _is_shared(name):
                search(child, f"{prefix}{name}.")

    search(root, "")
    if stacks and not containers and not others:
        yield ExpertWeights(root, (), stacks)
    elif len(containers) == 1 and not stacks:
        yield ExpertWeights(root, containers[0], _matrices_of(containers[0]))
    elif stacks or containers:
        raise UnknownExpertsError(
            f"expected parameters that belong to one of the {num_experts} experts each in {type(root).__name__}, found"
            f" also {', '.join(others) or 'several groups of experts'}"
        )


def _members(module: nn.Module, num_experts: int) -> tuple[nn.Module, ...]:
    """Return the E modules of one class with parameters in a container of modules, or nothing."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return ()
    with_weights = tuple(child for child in module.children() if next(child.parameters(), None) is not None)
    fits = len(with_weights) == num_experts and len({type(child) for child in with_weights}) == 1
    return with_weights if fits else ()


def _matrices_of(members: Sequence[nn.Module]) -> dict[str, list[Tensor]]:
    if any(is_parametrized(module) for member in members for module in member.modules()):
        raise UnknownExpertsError("the weights of the experts are parametrized")
    named = [{name: p for name, p in member.named_parameters() if p.dim() > 1} for member in members]
    shapes = [{name: p.shape for name, p in matrices.items()} for matrices in named]
    if not shapes[0] or any(other != shapes[0] for other in shapes):
        raise UnknownExpertsError("expected experts with weight matrices of the same shapes, found different ones")
    return {name: [matrices[name] for matrices in named] for name in shapes[0]}


def _check_weights(experts: ExpertWeights) -> None:
    for name, found in experts.matrices.items():
        for matrix in [found] if isinstance(found, Tensor) else found:
            if hasattr(matrix, "device_mesh"):
                raise UnknownExpertsError(f"the weight {name} of the experts is sharded over processes (DTensor)")
            if type(matrix.data) is not Tensor or not matrix.is_floating_point() or matrix.itemsize < 2:
                raise UnknownExpertsError(
                    f"the weight {name} of the experts is a {type(matrix.data).__name__} of {matrix.dtype}, expected a"
                    " tensor of floating point numbers of at least 16 bits"
                )
            if matrix.is_meta:
                raise UnknownExpertsError(f"the weight {name} of the experts is on the meta device")


def _is_stack(parameter: Tensor, num_experts: int) -> bool:
    return parameter.dim() >= 3 and len(parameter) == num_experts


def _is_shared(name: str) -> bool:
    # not the class: GraniteMoeSharedExperts are the routed experts of a model with this name
    return "share" in name.lower()


def _says_expert(name: str, module: nn.Module) -> bool:
    return "expert" in name.lower() or "expert" in type(module).__name__.lower()

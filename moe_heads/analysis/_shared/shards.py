"""Parameters that are divided among processes (FSDP2): the part that each process holds."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "CHECKPOINT_REMEDY",
    "REMEDY",
    "Shards",
    "check_whole",
    "full",
    "is_shard",
    "is_sharded",
    "local",
    "part_of",
    "reshard",
]

CHECKPOINT_REMEDY = "Analyze a checkpoint in one process, with `moe-heads analyze` or callback.analyze(model, ...)"
"""Remedy for an analysis that no sharded model supports."""

REMEDY = f'{CHECKPOINT_REMEDY}, or choose a module that fits into each process, such as params=["head"]'
"""Remedy for an analysis that needs whole parameters."""


def is_shard(tensor: object) -> bool:
    """Return whether a tensor is a part of a tensor that is divided among processes."""
    # without an import, which takes a while: where the module was not imported, there is no such tensor
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Return whether parameters of a model are divided among processes, also while they are gathered for a pass."""
    return any(True for _ in _units(model)) or any(map(is_shard, model.parameters()))


def reshard(model: nn.Module) -> None:
    """Release the parameters that the last pass gathered. Otherwise the next pass would use their old values."""
    for unit in _units(model):
        unit.reshard()


def _units(model: nn.Module) -> Iterator[Any]:
    module = sys.modules.get("torch.distributed.fsdp")
    if module is not None:
        yield from (unit for unit in model.modules() if isinstance(unit, module.FSDPModule))


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor in this process, which shares its memory; a plain tensor as it is."""
    part: Any = tensor
    return cast(Tensor, part.detach().to_local()) if is_shard(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor. All processes have to call this."""
    part: Any = tensor.detach()
    return cast(Tensor, part.full_tensor() if is_shard(tensor) else part)


def part_of(tensor: Tensor, values: Tensor) -> Tensor:
    """Return the part of ``values``, of the whole shape of ``tensor``, that belongs to this process."""
    if not is_shard(tensor):
        return values
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    here: Any = tensor
    shape, offset = compute_local_shape_and_global_offset(here.shape, here.device_mesh, here.placements)
    for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
        # a process without a row may have an offset behind the end
        values = values.narrow(dim, min(start, values.shape[dim] - length), length)
    return values


def check_whole(chosen: Mapping[str, Tensor], model: nn.Module) -> None:
    """Check that each process holds the whole of all parameters.

    torch returns no gradient for a parameter that is sharded, or zeros with ``materialize_grads``: a Hessian of zeros.

    Raises:
        ValueError: If a parameter is sharded.
    """
    sharded = next((name for name, p in chosen.items() if is_shard(p)), None)
    if sharded is None and any(True for _ in _units(model)):
        inside = {id(p) for unit in _units(model) for p in unit.parameters()}
        sharded = next((name for name, p in chosen.items() if id(p) in inside), None)
    if sharded is not None:
        raise ValueError(
            f"model: expected parameters that each process holds as a whole, got the sharded {sharded!r}, for which"
            f" torch.autograd.grad returns no gradient. {REMEDY}."
        )


class Shards:
    """Places of the parts of this process in a flat vector over whole parameters.

    Args:
        params: The parameters.

    Raises:
        ValueError: If some are divided among processes, and others are not.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._params = list(params)
        if len({is_shard(p) for p in self._params}) > 1:
            raise ValueError(
                "model: expected parameters that are all sharded, got some that each process holds as a whole. Their"
                " gradients would not be added up over the processes. Pass the module that holds them to fully_shard,"
                " or freeze it."
            )
        self._sizes = [p.numel() for p in self._params]
        first: Any = next((p for p in self._params if is_shard(p)), None)
        self._group = None if first is None else first.device_mesh.get_group()

    def cut(self, vector: Tensor) -> list[Tensor]:
        """Return the parts of a flat vector in this process, in the shapes of the local parameters."""
        pieces = zip(self._params, vector.split(self._sizes), strict=True)
        return [part_of(p, piece.view(p.shape)) for p, piece in pieces]

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return the sum of a small tensor over the processes that hold the parameters."""
        if self._group is None:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self._group)
        return total

    @property
    def num_processes(self) -> int:
        """Number of processes that hold the parameters."""
        return 1 if self._group is None else dist.get_world_size(self._group)

    def clear_gradients(self) -> None:
        """Set ``.grad`` to None, also while the model shows other parameters, those that a pass has gathered."""
        for parameter in self._params:
            parameter.grad = None

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """Return the gradients of the parts of this process; zeros for a parameter without one."""
        return [torch.zeros_like(local(p.detach())) if p.grad is None else local(p.grad).detach() for p in self._params]

"""Processes that run a sharded model in step.

A forward pass of such a model gathers its parameters, so all processes have to run the same number of passes.
"""

from typing import Any

from torch import nn
from typing_extensions import override

from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.shards import CHECKPOINT_REMEDY, is_shard, is_sharded, reshard

__all__ = ["InStep", "in_step", "ranks_of", "work_in_step"]


def ranks_of(model: nn.Module, ranks: Ranks | None) -> Ranks:
    """Return the processes that share an analysis. For a sharded model these are by default those of its mesh.

    Raises:
        ValueError: If the parameters are distributed over several dimensions, or ``ranks`` are other processes.
    """
    if not is_sharded(model):
        return ranks or Ranks()
    reshard(model)
    shards: list[Any] = [p for p in model.parameters() if is_shard(p)]
    meshes = [p.device_mesh for p in shards]
    if any(mesh.ndim > 1 for mesh in meshes) or not all(p.placements[0].is_shard() for p in shards):
        names = ", ".join(map(str, meshes[0].mesh_dim_names or meshes[0].shape))
        raise ValueError(
            "model: expected parameters sharded over one dimension of processes (data parallel), got the placements"
            f" {shards[0].placements} on the mesh {names}. {CHECKPOINT_REMEDY}."
        )
    if ranks is None:
        return Ranks(meshes[0].get_group() if meshes else None)
    if meshes and ranks.size != meshes[0].size():
        raise ValueError(
            f"ranks: expected the {meshes[0].size()} processes that hold the parameters, got {ranks.size}. Pass"
            " ranks=None for the processes of the mesh."
        )
    return ranks


def work_in_step(model: nn.Module, data: Batches, ranks: Ranks) -> None:
    """Check that all processes have the same number of batches of a sharded model, and keep the batches whole.

    Raises:
        ValueError: If the numbers differ: a process without a further batch would let the others wait forever.
    """
    if not is_sharded(model):
        return
    numbers = ranks.gather(len(data.pieces))
    if len(set(numbers)) > 1:
        raise ValueError(
            f"batches: expected the same number of batches on each rank for a sharded model, got {numbers}. All ranks"
            " run each forward pass together. Divide each batch among the ranks."
        )
    data.may_cut = False


class InStep(Progress):
    """A progress whose time limit ends all ranks at the same batch.

    Args:
        progress: The progress of this rank.
        ranks: The processes, which check the time limit the same number of times.
    """

    def __init__(self, progress: Progress, ranks: Ranks) -> None:
        super().__init__(on_warning=progress.warn)
        self._own, self._ranks = progress, ranks

    @override
    def tick(self) -> None:
        with self._ranks.synchronized():
            self._own.tick()

    @override
    def step(self, done: int, total: int | None = None, **quantities: float) -> None:
        with self._ranks.synchronized():
            self._own.step(done, total, **quantities)


def in_step(model: nn.Module, progress: Progress, ranks: Ranks, alone: Progress | None = None) -> Progress:
    """Return the progress to check before each batch.

    Args:
        model: The model. If it is sharded, all ranks end at the same batch.
        progress: The progress of this rank.
        ranks: The processes.
        alone: What to return for a model that is not sharded. Defaults to ``progress``.
    """
    return InStep(progress, ranks) if is_sharded(model) else (alone or progress)

"""Parts of sharded parameters, on a mesh of one process and without one. test_sharded_models.py has two processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.in_step import InStep, in_step, ranks_of, work_in_step
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.shards import (
    Shards,
    check_whole,
    full,
    is_shard,
    is_sharded,
    local,
    part_of,
    reshard,
)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(mesh: DeviceMesh) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    fully_shard(model, mesh=mesh)
    return model


def test_plain_tensors_are_whole() -> None:
    tensor = torch.randn(2, 3)
    assert local(tensor) is tensor
    assert part_of(tensor, tensor) is tensor
    assert torch.equal(full(tensor), tensor)
    assert not is_sharded(nn.Linear(2, 1))
    check_whole({"weight": tensor}, nn.Linear(2, 1))
    shards = Shards([tensor])
    assert shards.num_processes == 1
    assert torch.equal(shards.cut(torch.arange(6.0))[0], torch.arange(6.0).view(2, 3))
    assert shards.all_reduce(tensor) is tensor


def test_a_pass_hides_the_parts_until_they_are_resharded(mesh: DeviceMesh) -> None:
    model = sharded(mesh)
    parts = list(model.parameters())
    assert all(map(is_shard, parts))
    model(torch.randn(4, 3))
    assert is_sharded(model)
    assert not any(map(is_shard, model.parameters()))
    with pytest.raises(ValueError, match=r"got the sharded '0\.weight'"):
        check_whole(dict(model.named_parameters()), model)
    reshard(model)
    assert all(mine is part for mine, part in zip(model.parameters(), parts, strict=True))
    with pytest.raises(ValueError, match=r"Analyze a checkpoint in one process, .* or choose a module"):
        check_whole(dict(model.named_parameters()), model)


def test_local_parts_share_the_memory_of_the_parameters(mesh: DeviceMesh) -> None:
    model = sharded(mesh)
    x = torch.ones(1, 3)
    before = model(x)
    reshard(model)
    local(next(model.parameters())).add_(1)
    assert not torch.equal(model(x), before)


def test_parameters_that_are_sharded_in_part_have_no_flat_vector(mesh: DeviceMesh) -> None:
    with pytest.raises(ValueError, match="expected parameters that are all sharded"):
        Shards([*sharded(mesh).parameters(), torch.zeros(2)])


def test_the_mesh_gives_the_ranks_and_has_one_dimension(mesh: DeviceMesh) -> None:
    model = sharded(mesh)
    ranks = ranks_of(model, None)
    assert ranks.size == 1
    given = Ranks()
    assert ranks_of(model, given) is given
    assert ranks_of(nn.Linear(2, 1), given) is given
    copied = nn.Linear(2, 1)
    copied.weight = nn.Parameter(distribute_tensor(copied.weight.data, mesh, [Replicate()]))
    assert isinstance(copied.weight, DTensor)
    with pytest.raises(ValueError, match=r"sharded over one dimension of processes .* got the placements"):
        ranks_of(copied, None)


def test_batches_of_a_sharded_model_stay_whole(mesh: DeviceMesh) -> None:
    data = Batches([torch.randn(4, 3)], [4])
    work_in_step(nn.Linear(3, 1), data, Ranks())
    assert data.may_cut
    work_in_step(sharded(mesh), data, Ranks())
    assert not data.may_cut


def test_a_progress_in_step_has_the_limit_and_the_display_of_its_own(mesh: DeviceMesh) -> None:
    seen: list[int] = []
    progress = Progress(show=lambda done, total, quantities: seen.append(done))
    stepping = in_step(sharded(mesh), progress, Ranks())
    assert isinstance(stepping, InStep)
    stepping.step(1, 2)
    assert seen == [1]
    assert in_step(nn.Linear(2, 1), progress, Ranks()) is progress
    with pytest.raises(TimeUp):
        in_step(sharded(mesh), Progress(1e-9), Ranks()).tick()

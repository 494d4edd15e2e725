"""Models whose parameters are divided among two processes (FSDP2), next to the same models in one piece."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from moe_heads import SparseMoE
from moe_heads.analysis._shared.shards import local, reshard

NUM_FEATURES, NUM_CLASSES = 5, 3


class SmallNet(nn.Module):
    """A backbone, a sparse head and a layer after it; odd sizes, so that processes hold parts of different sizes."""

    def __init__(self, activation: Callable[[], nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(NUM_FEATURES, 7), activation(), nn.Linear(7, 6), activation())
        self.head = SparseMoE(6, 5, num_experts=4, expert_width=3, balance=None, dropout=0.0)
        self.out = nn.Linear(5, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.head(self.backbone(x)))


class SmoothNet(nn.Module):
    """Without a router, whose choices are kinks of the loss; ``head`` is the last layer."""

    def __init__(self, activation: Callable[[], nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(NUM_FEATURES, 7), activation(), nn.Linear(7, 6), activation())
        self.head = nn.Linear(6, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def pair_of(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """The same model in one piece and sharded, with one unit for the backbone and one for the rest."""
    torch.manual_seed(0)
    whole = build().to(dtype).eval()
    sharded = build().to(dtype).eval()
    sharded.load_state_dict(whole.state_dict())
    shard(sharded)
    return whole, sharded


def shard(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    fully_shard(model.backbone, mesh=mesh)
    fully_shard(model, mesh=mesh)


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches_of(sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, NUM_FEATURES, generator=generator, dtype=dtype),
            torch.randint(NUM_CLASSES, (size,), generator=generator),
        )
        for size in sizes
    ]


def share_of(batches: list[tuple[Tensor, Tensor]], rank: int) -> list[tuple[Tensor, Tensor]]:
    """Part of a rank in each batch: a third of the samples for rank zero, so that weights differ."""
    parts = [slice(0, len(x) // 3) if rank == 0 else slice(len(x) // 3, None) for x, _ in batches]
    return [(x[part], y[part]) for part, (x, y) in zip(parts, batches, strict=True)]


def local_state(model: nn.Module) -> dict[str, Any]:
    """Everything that an analysis must leave as it was, of this process."""
    reshard(model)
    return {
        "values": {name: local(p.detach()).clone() for name, p in model.named_parameters()},
        "grads": {name: None if p.grad is None else local(p.grad).clone() for name, p in model.named_parameters()},
        "identities": {name: id(p) for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: child.training for name, child in model.named_modules()},
        "rng": torch.get_rng_state(),
    }


def assert_same(before: Any, after: Any) -> None:
    if isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, Tensor):
        assert torch.equal(before, after)
    else:
        assert before == after

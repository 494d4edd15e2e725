"""Routers of models that are split over processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from moe_heads import collect_routing
from moe_heads.routing.recognition import recognized
from tests.support.processes import run_on_ranks


class TopKRouter(nn.Module):
    """A gate whose output is distributed as given."""

    def __init__(self, placement: Placement | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.placement = nn.Linear(6, 5), placement

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        logits = self.linear(x)
        weights, indices = logits.softmax(-1).topk(2, dim=-1)
        if self.placement is None:
            return logits, weights, indices
        mesh = init_device_mesh("cpu", (2,))
        return tuple(DTensor.from_local(t, mesh, [self.placement], run_check=False) for t in (logits, weights, indices))


def on_rank(rank: int) -> dict[str, Any]:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(rank))
    found: dict[str, Any] = {}
    for name, placement in {
        "replicated": Replicate(),
        "tokens": Shard(0),
        "experts": Shard(1),
        "summands": Partial(),
    }.items():
        router = TopKRouter(placement)
        with collect_routing(nn.Sequential(router)) as collection:
            router(x)
            reasons = dict(collection.only_here)
        counts = collection.stats["head"].counts.tolist() if collection.routings else None
        found[name] = counts, reasons, {key: str(error) for key, error in collection.errors.items()}
    indices = TopKRouter()(x)[2].flatten().tolist()
    found["expected"] = [indices.count(expert) for expert in range(5)]
    return found


@pytest.mark.slow
def test_distributed_tensors(tmp_path: Path) -> None:
    for found in run_on_ranks(on_rank, tmp_path):
        assert found["replicated"] == (found["expected"], {}, {})
        counts, reasons, errors = found["tokens"]
        assert counts == found["expected"] and "its tokens are distributed" in reasons["head"] and not errors
        for name in ("experts", "summands"):
            counts, _, errors = found[name]
            assert counts is None and "splits the experts" in errors["head"]


class ExpertsHere(nn.Module):
    """The experts of one process, two of six."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.weight = 2, nn.Parameter(torch.randn(2, 6, 6))


class Layer(nn.Module):
    def __init__(self, first: int, is_numbered_here: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = Gate(first, is_numbered_here), ExpertsHere()


class Gate(nn.Module):
    """Choices among all experts, or numbered as in older versions of transformers: 2 for those of other processes."""

    def __init__(self, first: int, is_numbered_here: bool) -> None:
        super().__init__()
        self.linear, self.first, self.is_numbered_here = nn.Linear(7, 6), first, is_numbered_here

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.linear(x)
        weights, chosen = logits.softmax(-1).topk(2, dim=-1)
        if self.is_numbered_here:
            is_here = (chosen >= self.first) & (chosen < self.first + 2)
            weights, chosen = weights * is_here, torch.where(is_here, chosen - self.first, 2)
        return logits, weights, chosen


@pytest.mark.parametrize("first", [0, 2, 4])
def test_a_router_that_numbers_the_experts_of_its_process(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognized, "has_processes", lambda: True)
    x = torch.randn(30, 7)
    model = Layer(first, False)
    with collect_routing(model) as everywhere:
        model.gate(x)
        assert not everywhere.only_here
    here = Layer(first, True)
    with collect_routing(here) as collection:
        here.gate(x)
        assert "2 experts of this process, of 6" in collection.only_here["head"]
        num_experts = {len(routing.stats().counts) for routing in collection.routings["head"]}
        # a pass that needs no other process has as many experts
        here.gate.forward = lambda x: (torch.randn(4, 6), torch.ones(4, 2), torch.tensor([[0, 1]] * 4))
        here.gate(torch.randn(4, 7))
        assert num_experts == {2} == {len(r.stats().counts) for r in collection.routings["head"]}
        collection.routings["head"].pop()
    counts = everywhere.stats["head"].counts
    assert collection.stats["head"].counts.tolist() == counts[first : first + 2].tolist()
    assert int(collection.stats["head"].num_dropped_choices) == 60 - int(counts[first : first + 2].sum())

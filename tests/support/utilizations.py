"""Utilization of heads by their load alone, for the tests of its outputs."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from moe_heads import Routing, RoutingStats
from moe_heads.analysis.expert_utilization.head_utilization import HeadUtilization, dead_and_starved


def head_of(load: Sequence[float] | torch.Tensor, **changed: Any) -> HeadUtilization:
    """A sparse head with this load, as its importance too."""
    shares = torch.as_tensor(load, dtype=torch.float64)
    shares = shares / shares.sum()
    dead, starved = dead_and_starved((shares * len(shares)).tolist(), 0.01, 0.25)
    numbers: dict[str, Any] = {
        "load": shares,
        "importance": shares,
        "entropy": 0.5,
        "entropy_of_mean": 0.6,
        "effective_experts": math.exp(float(torch.special.entr(shares).sum())),
        "effective_experts_per_row": 1.5,
        "margin": 0.5,
        "dropped": 0.0,
        "dead_experts": dead,
        "starved_experts": starved,
        "coactivation": None,
        "class_map": None,
        "class_counts": None,
        "mutual_information": None,
        "mutual_information_corrected": None,
        "mutual_information_stderr": None,
        "mutual_information_by_chance": None,
        "mutual_information_p_value": None,
        "soft": False,
        "num_rows": 1000,
        "num_choices": 100_000,
        "num_nonfinite": 0,
    }
    return HeadUtilization(**(numbers | changed))


def heads_of(num_layers: int, num_experts: int, **changed: Any) -> dict[str, HeadUtilization]:
    """Heads of random load, with a dead expert in every fifth layer."""
    generator = torch.Generator().manual_seed(0)
    heads: dict[str, HeadUtilization] = {}
    for layer in range(num_layers):
        load = torch.rand(num_experts, generator=generator) + 0.5
        load[0] *= layer % 5 != 4
        heads[f"model.layers.{layer}.mlp.gate"] = head_of(load, **changed)
    return heads


def stats_of(counts: Sequence[int]) -> RoutingStats:
    """Statistics of rows that each chose one expert."""
    chosen = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).unsqueeze(1)
    return Routing.from_probs(torch.full((len(chosen), len(counts)), 1 / len(counts)), chosen).stats()

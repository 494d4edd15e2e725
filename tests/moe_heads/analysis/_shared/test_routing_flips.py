import math

import torch

from moe_heads.analysis._shared.routing_flips import choices_of, flip_share
from moe_heads.routing import Routing, RoutingCollection


def collected(*logits: torch.Tensor, k: int = 1) -> RoutingCollection:
    collection = RoutingCollection()
    for index, z in enumerate(logits):
        top = z.topk(k)
        collection.routings[str(index)] = [Routing(z, z.softmax(-1), top.indices, top.values.softmax(-1))]
    return collection


def test_mean_over_the_heads() -> None:
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    reference = choices_of(collected(z, z))
    assert flip_share(choices_of(collected(z, z.flip(1))), reference) == 0.5
    assert flip_share(choices_of(collected(z, z)), reference) == 0


def test_a_row_that_loses_its_finite_logits_flips() -> None:
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    broken = torch.tensor([[torch.inf, 0.0], [0.0, 1.0]])
    assert flip_share(choices_of(collected(broken)), choices_of(collected(z))) == 0.5
    assert flip_share(choices_of(collected(broken)), choices_of(collected(broken))) == 0


def test_soft_routers_choose_their_largest_gate() -> None:
    def soft(z: torch.Tensor) -> RoutingCollection:
        collection = RoutingCollection()
        collection.routings["head"] = [Routing(z, z.softmax(-1))]
        return collection

    z = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    moved = torch.tensor([[1.0, 0.9, 0.5], [2.0, 1.0, 0.5]])
    assert flip_share(choices_of(soft(moved)), choices_of(soft(z))) == 0.5


def test_without_a_router() -> None:
    assert math.isnan(flip_share([], []))

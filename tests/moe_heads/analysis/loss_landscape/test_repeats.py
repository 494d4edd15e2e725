"""One pass serves loss, accuracy and the loss at fixed routing, as far as they have it in common."""

import pytest
import torch
from torch import Tensor, nn

from moe_heads import SparseMoE
from moe_heads.analysis import filter_normalized, loss_landscape, random_direction
from moe_heads.analysis.loss_landscape.repeats import Repeats

pytestmark = pytest.mark.usefixtures("without_mean_check")


class Noting(nn.Module):
    def __init__(self, module: nn.Module, calls: list[str]) -> None:
        super().__init__()
        self.module, self.note = module, lambda: calls.append("call")

    def forward(self, x: Tensor) -> Tensor:
        self.note()
        return self.module(x)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]).argmax(-1) == batch[1]).double().mean()


def shifted_accuracy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0] + 1).argmax(-1) == batch[1]).double().mean()


@pytest.mark.parametrize(("accuracy_fn", "passes"), [(None, 1), (accuracy, 1), (shifted_accuracy, 2)])
def test_a_full_plane_makes_one_pass_through_the_backbone_a_point(accuracy_fn: object, passes: int) -> None:
    backbone, head = [], []
    model = nn.Sequential(
        Noting(nn.Linear(6, 8), backbone), Noting(SparseMoE(8, 3, num_experts=4, expert_width=5), head)
    )
    x, y = torch.randn(50, 6), torch.randint(3, (50,))
    directions = [filter_normalized(model, random_direction(model, seed)) for seed in (0, 1)]
    plane = loss_landscape(
        model,
        cross_entropy,
        [(x, y)],
        direction1=directions[0],
        direction2=directions[1],
        num_points=5,
        accuracy_fn=accuracy_fn,  # type: ignore[arg-type]
    )
    assert plane.routing_flips is not None
    num_flipped = int((plane.routing_flips > 0).sum())
    assert num_flipped > 15
    # at three points all is measured both ways, the loss at fixed routing and the accuracy too; the latter also at the
    # center
    proofs = 3 * (2 if accuracy_fn is None else 3) + (accuracy_fn is accuracy)
    proofs += 1 if accuracy_fn is None else 2  # the center is measured with a graph too
    assert len(backbone) == 25 * passes + proofs
    assert len(head) == 25 * passes + num_flipped + proofs


def test_accuracies_are_those_of_a_pass_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(50, 6), torch.randint(3, (50,))
    for function in (accuracy, shifted_accuracy):
        line = loss_landscape(
            model, cross_entropy, [(x, y)], direction1=3 * random_direction(model), accuracy_fn=function, num_points=5
        )
        # the same function as a loss has nothing to share
        alone = loss_landscape(model, function, [(x, y)], direction1=3 * random_direction(model), num_points=5)
        assert line.accuracies is not None and torch.equal(line.accuracies, alone.losses)
        assert line.accuracies.unique().numel() > 2


def test_calls_inside_a_remembered_one_are_not_remembered() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    repeats, x = Repeats.of_all(model), torch.ones(1, 2)
    with torch.no_grad(), repeats.active():
        with repeats.recorded():
            first = model(x)
        with repeats.replayed():
            assert model(x) is first
            assert model[0](x) is not model[0](x)
        with repeats.replayed():  # forgotten after one use
            assert model(x) is not first
    assert model(x) is not first


def test_random_numbers_are_drawn_anew() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(1)

    model = nn.Sequential(Noisy(), nn.Linear(1, 1))
    repeats = Repeats.of_all(model)
    with torch.no_grad(), repeats.active():
        with repeats.recorded():
            first = model(torch.ones(1, 1))
        with repeats.replayed():
            assert not torch.equal(model(torch.ones(1, 1)), first)

"""What is computed once gives the numbers of plain passes, or is given up with a reason."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads import SparseMoE, collect_routing, fixed_routing
from moe_heads.analysis import (
    direction_sweep,
    loss_landscape,
    normalized_random_direction,
    random_direction,
)

pytestmark = pytest.mark.usefixtures("without_mean_check")

Batch = tuple[Tensor, Tensor]


class Peeking(nn.Module):
    """Looks at one weight of the head, which it does not hold, when that has moved far."""

    def __init__(self, head: nn.Linear, far: float) -> None:
        super().__init__()
        self.layer, self.far = nn.Linear(6, 8), far
        self.seen = lambda: head.weight[0, 0].detach()
        self.start = float(self.seen())

    def forward(self, x: Tensor) -> Tensor:
        moved = abs(float(self.seen()) - self.start)
        return self.layer(x) + (moved if moved > self.far else 0.0)


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]).argmax(-1) == batch[1]).double().mean()


class Adapter(nn.Module):
    """A backbone with a part that is switched on from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.adapter, self.on = nn.Linear(6, 8), nn.Linear(6, 8), False

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + (self.adapter(x) if self.on else 0)


class Difference(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = Adapter(), head

    def forward(self, x: Tensor) -> Tensor:
        without = self.backbone(x)
        self.backbone.on = True
        with_it = self.backbone(x)
        self.backbone.on = False
        return self.head(without - with_it)


class Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.layer(x)
        return [h, h.relu()]


class Edited(nn.Module):
    """Edits the list that its backbone returned."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = Levels(), head

    def forward(self, x: Tensor) -> Tensor:
        levels = self.backbone(x)
        levels[-1] = levels[-1] * 3
        return self.head(levels[-1])


def data() -> Batch:
    return torch.randn(40, 6), torch.randint(3, (40,))


def moved(model: nn.Module, direction: Tensor, params: Any = None) -> nn.Module:
    other = copy.deepcopy(model)
    start = 0
    with torch.no_grad():
        for name, p in other.named_parameters():
            if params is None or name.split(".")[0] in params:
                p.add_(direction[start : start + p.numel()].view_as(p))
                start += p.numel()
    return other


@pytest.mark.parametrize("kind", [Difference, Edited])
def test_the_center_is_that_of_plain_passes(kind: Any) -> None:
    model, batch = kind(nn.Linear(8, 3)).eval(), data()
    direction = random_direction(model, params=["head"])
    line = loss_landscape(
        model, cross_entropy, [batch], direction1=direction, params=["head"], alphas=[-1, -0.5, 0, 0.5, 1]
    )
    assert line.center_loss == pytest.approx(cross_entropy(model, batch).item(), rel=1e-6)
    for place, sign in ((0, -1), (-1, 1)):
        there = cross_entropy(moved(model, sign * direction, ["head"]), batch).item()
        assert line.losses[place].item() == pytest.approx(there, rel=1e-5)
    sweep = direction_sweep(model, cross_entropy, [batch], num_directions=2, params=["head"], num_points=3)
    assert sweep.center_loss == line.center_loss
    assert (line.not_reused == "a module gave another output for the same inputs") == (kind is Difference)


@pytest.mark.parametrize("kind", [Difference, Edited])
def test_the_loss_at_fixed_routing_is_that_of_a_plain_pass(kind: Any) -> None:
    model, batch = kind(SparseMoE(8, 3, num_experts=4, k=1)).eval(), data()
    direction = random_direction(model)
    line = loss_landscape(model, cross_entropy, [batch], direction1=direction, alphas=[-1, -0.5, 0, 0.5, 1])
    assert line.losses_fixed_routing is not None and line.routing_flips is not None and line.routing_flips[-1] > 0
    with torch.no_grad(), collect_routing(model) as reference:
        model(batch[0])
    for place, step in ((-1, 1.0), (1, -0.5)):
        there = moved(model, step * direction)
        with torch.no_grad(), fixed_routing(there, reference):
            expected = cross_entropy(there, batch).item()
        assert line.losses_fixed_routing[place].item() == pytest.approx(expected, rel=1e-5)
    if kind is Difference:
        assert "fixed routing: a module gave another output" in line.not_shared
        assert line.not_shared in line.summary()
    else:
        assert line.not_shared == ""


def averaged(model: nn.Module, batch: Batch) -> Tensor:
    """The accuracy of other weights than those of the loss."""
    old = [p.detach().clone() for p in model.parameters()]
    for number, p in enumerate(model.parameters()):
        p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    found = accuracy(model, batch)
    for p, values in zip(model.parameters(), old, strict=True):
        p.data.copy_(values)
    return found


def in_training_mode(model: nn.Module, batch: Batch) -> Tensor:
    model.train()
    loss = cross_entropy(model, batch)
    model.eval()
    return loss


class Flagged(nn.Sequential):
    is_flipped = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x if self.is_flipped else x)


def flipped(model: nn.Module, batch: Batch) -> Tensor:
    model.is_flipped = True  # type: ignore[assignment]
    found = accuracy(model, batch)
    model.is_flipped = False  # type: ignore[assignment]
    return found


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(x)}


def negated(model: nn.Module, batch: Batch) -> Tensor:
    output = model(batch[0])
    output["logits"] = -output["logits"]
    return nn.functional.cross_entropy(output["logits"], batch[1])


def named_accuracy(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0])["logits"].argmax(-1) == batch[1]).double().mean()


def normed() -> nn.Module:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    model[0].running_mean.fill_(2.0)  # type: ignore[union-attr, operator]
    return model


@pytest.mark.parametrize(
    ("make", "loss", "accuracy_fn"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 3)), cross_entropy, averaged),
        (normed, in_training_mode, accuracy),
        (lambda: Flagged(nn.Linear(6, 3)), cross_entropy, flipped),
        (Named, negated, named_accuracy),
    ],
)
def test_the_accuracy_is_that_of_a_pass_of_its_own(make: Callable[[], nn.Module], loss: Any, accuracy_fn: Any) -> None:
    torch.manual_seed(2)
    model, batch = make().eval(), data()
    direction = random_direction(model)
    line = loss_landscape(
        model, loss, [batch], direction1=direction, accuracy_fn=accuracy_fn, alphas=[-1, -0.5, 0, 0.5, 1]
    )
    assert line.accuracies is not None
    assert line.center_accuracy == pytest.approx(float(accuracy_fn(model, batch)))
    for found, alpha in zip(line.accuracies.tolist(), line.alphas.tolist(), strict=True):
        # the statistics of a batch norm are left behind by the loss in training mode
        if loss is not in_training_mode or alpha == 0:
            assert found == pytest.approx(float(accuracy_fn(moved(model, alpha * direction), batch)))
    assert ("accuracy: a module gave another output" in line.not_shared) == (make is not Named)


def test_a_reference_to_a_moved_weight_shows_at_the_ends() -> None:
    class Peeking(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.layer, self.reference = nn.Linear(1, 1, bias=False), [head]

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.reference[0].weight.round()  # type: ignore[operator]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 1, bias=False)
            self.backbone = Peeking(self.head)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x))

    model = Model()
    for p in model.parameters():
        nn.init.ones_(p)
    for alphas in ([-1, -0.2, 0, 0.2, 1], [-0.3, -0.2, 0, 0.2, 1], [-1, -0.2, 0, 0.2, 0.3]):
        line = loss_landscape(
            model,
            lambda m, b: m(b).mean(),
            [torch.ones(2, 1)],
            direction1=torch.ones(1),
            params=["head"],
            alphas=alphas,
        )
        weights = [1 + alpha for alpha in alphas]
        assert line.losses.tolist() == pytest.approx([w * round(w) for w in weights])
        assert line.not_reused == "a module gave another output for the same inputs"


def test_a_sweep_proves_along_every_direction_what_it_saves() -> None:
    """The backbone gives something else only along the direction that moves one weight most."""
    head, batch = nn.Linear(8, 3), (torch.randn(10, 6), torch.randint(3, (10,)))
    steps = [abs(float(normalized_random_direction(head, seed)[0])) for seed in range(4)]
    assert max(steps) != steps[0]
    model = nn.Sequential(Peeking(head, far=sum(sorted(steps)[-2:]) / 2), head)
    options: dict[str, Any] = {"num_directions": 4, "params": ["1"], "num_points": 9}
    found = direction_sweep(model, cross_entropy, [batch], **options)
    model[0].register_forward_hook(lambda *_: None)
    model[0].layer.register_forward_hook(lambda *_: None)  # somebody listens inside: nothing is computed once
    torch.testing.assert_close(
        found.losses, direction_sweep(model, cross_entropy, [batch], **options).losses, rtol=0, atol=0
    )


def test_a_sweep_makes_one_plain_pass_for_each_direction() -> None:
    passes: list[int] = []
    model, batch = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), (torch.randn(10, 6), torch.randint(3, (10,)))

    def loss(m: nn.Module, b: Batch) -> Tensor:
        passes.append(1)
        return cross_entropy(m, b)

    direction_sweep(model, loss, [batch], num_directions=5, params=["1"], num_points=9)
    assert len(passes) == 2 + 5 * (8 + 1)  # the center with a graph and without

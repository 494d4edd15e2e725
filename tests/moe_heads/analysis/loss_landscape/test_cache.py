"""Reused outputs give the values of plain evaluations bit for bit, or reuse is disabled with a reason."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads import SparseMoE, collect_routing, fixed_routing
from moe_heads.analysis import (
    LossLandscapeResult,
    direction_sweep,
    filter_normalized,
    loss_landscape,
    normalized_random_direction,
    random_direction,
)
from moe_heads.analysis._shared.forwards import intercepted
from moe_heads.analysis.loss_landscape import cache as cache_module
from moe_heads.analysis.loss_landscape.cache import OutputCache, _Call, _largest_modules
from tests.support.untouched import untouched

pytestmark = pytest.mark.usefixtures("without_mean_check")

Batch = tuple[Tensor, Tensor]

NUM_POINTS, NUM_VALIDATIONS = 7, 3
DIFFERENT = "a module returned a different output for the same inputs"


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]).argmax(-1) == batch[1]).double().mean()


class Counting(nn.Module):
    """A module that counts the passes through another one, outside of the state that `analysis_mode` restores."""

    def __init__(self, module: nn.Module, note: Callable[[int], None]) -> None:
        super().__init__()
        self.module, self.note = module, note

    def forward(self, x: Tensor) -> Tensor:
        self.note(len(x))
        return self.module(x)


def test_a_call_compares_inputs_bit_for_bit() -> None:
    x = torch.tensor([1.0, 2.0])
    call = _Call((x,), {"scale": 2}, x * 2)
    assert call.has_inputs((x,), {"scale": 2})
    assert call.has_inputs((x.clone(),), {"scale": 2})
    for args, kwargs in (
        ((x + 1e-7,), {"scale": 2}),
        ((x.double(),), {"scale": 2}),
        ((x,), {"scale": 2.0}),
        ((x,), {"factor": 2}),
        ((x,), {}),
        ((x, x), {"scale": 2}),
        ((None,), {"scale": 2}),
    ):
        assert not call.has_inputs(args, kwargs)


def test_a_call_with_changed_tensors_is_not_reusable() -> None:
    x = torch.ones(2)
    for changed in (0, 1):
        tensors = [x.clone(), x.clone()]
        call = _Call((tensors[0],), {}, tensors[1])
        assert call.is_reusable
        tensors[changed].add_(1)
        assert not call.is_reusable


def test_a_call_with_a_graph_or_other_objects_is_not_reusable() -> None:
    x = torch.ones(2)
    assert not _Call((x,), {}, x.clone().requires_grad_()).is_reusable
    assert not _Call((x,), {}, object()).is_reusable
    with torch.inference_mode():
        assert not _Call((x,), {}, torch.ones(2)).is_reusable


def test_interception_ends_after_an_error_and_restores_forward() -> None:
    plain, patched = nn.Linear(1, 1), nn.Linear(1, 1)
    own = patched.forward = lambda x: x + 5
    seen = []
    try:
        with intercepted([plain, patched], lambda module, forward, args, kwargs: seen.append(module) or forward(*args)):
            assert patched(torch.ones(1)).item() == 6
            plain(torch.ones(1))
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert seen == [patched, plain]
    assert patched.forward is own
    assert "forward" not in vars(plain)


def test_largest_modules_have_parameters_and_no_router_or_hook() -> None:
    head = SparseMoE(4, 2, num_experts=2, expert_width=3)
    body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    watched = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    watched[1].register_forward_hook(lambda *args: None)
    model = nn.Sequential(body, nn.ReLU(), watched, head)
    found = list(_largest_modules(model, lambda module: True))
    assert found[:3] == [body, watched[0], watched[1]]
    assert all(head.router not in (module, *module.modules()) for module in found)


def convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3), nn.Flatten())


def images() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 1, 6, 6), torch.randint(3, (size,))) for size in (5, 3)]


def line(model: nn.Module, batches: Any, params: Any, **options: Any) -> LossLandscapeResult:
    direction = random_direction(model, params=params)
    return loss_landscape(
        model, cross_entropy, batches, direction1=direction, params=params, num_points=NUM_POINTS, **options
    )


def both(
    model: nn.Module, params: Any, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[LossLandscapeResult, ...]:
    batches = images()
    with untouched(model):
        kept = line(model, batches, params, **options)
    with monkeypatch.context() as patched:
        patched.setattr(cache_module, "_largest_modules", lambda *args: [])
        plain = line(model, batches, params, **options)
    assert torch.equal(kept.losses, plain.losses)
    return kept, plain


def test_a_backbone_runs_once_and_for_validations(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    model = nn.Sequential(
        Counting(convolutions(), lambda size: calls.append(size)), SparseMoE(12, 3, num_experts=4, expert_width=5)
    )
    kept, plain = both(model, ["1"], monkeypatch, fixed_routing=False)
    assert kept.reused[0] == "0"
    assert kept.not_reused == "" and plain.reused == ()
    # the center and the plain evaluations of three points; then the run without reuse
    center = [5, 5, 3, 3]  # with a graph and without
    assert calls == center + [5, 3] * NUM_VALIDATIONS + center + [5, 3] * (NUM_POINTS - 1)
    assert plain.losses.unique().numel() == NUM_POINTS


@pytest.mark.parametrize("params", [["3"], ["3.bias"], ["1"], ["0.weight"], ["5.router"], ["5.experts"], None])
def test_any_part_of_a_flat_model(params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*convolutions(), SparseMoE(12, 3, num_experts=4, expert_width=5))
    kept, _ = both(model, params, monkeypatch)
    expected = {None: (), "0.weight": (), "1": ("0",), "3": ("0",), "3.bias": ("0",)}
    if params is None or params[0] in expected:
        # the ReLU changes the output of the batch norm in place, so it is not reused
        assert kept.reused == expected[None if params is None else params[0]]
    else:
        assert {"0", "3"} <= set(kept.reused)


def test_a_branch_parallel_to_a_moved_module(monkeypatch: pytest.MonkeyPatch) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fixed, self.moving, self.last = nn.Linear(36, 4), nn.Linear(36, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(1)
            return self.last(self.fixed(flat) * self.moving(flat))

    kept, _ = both(Branches(), ["moving"], monkeypatch)
    assert kept.reused == ("fixed",)


def test_a_module_that_changes_more_than_its_output_disables_reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.passes = nn.Linear(36, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return self.layer(x.flatten(1))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Remembering(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x)) * (1 + self.body.passes // 3)

    kept = line(Model(), images()[:1], ["head"])
    assert kept.reused == ()
    assert kept.not_reused == "the loss with reused outputs of the center differed from that of a plain evaluation"
    assert f"No module was evaluated once for all points: {kept.not_reused}." in kept.summary()


def test_random_layers_draw_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(36, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(1)) + torch.randn(4)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Noisy(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x)) + torch.rand(3)

    kept, _ = both(Model(), ["head"], monkeypatch)
    assert kept.reused == ()


def test_a_loss_that_takes_a_gradient_reuses_nothing() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3))

    def penalized(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = batch[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(m(x), batch[1]), x)
        return gradient.square().sum()

    direction = random_direction(model, params=["3"])
    found = loss_landscape(model, penalized, images(), direction1=direction, params=["3"], num_points=3)
    assert found.losses.unique().numel() == 3
    assert found.reused == ()


def test_memory_limit() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 2))
    x = torch.randn(100, 10)
    for memory, names in ((2 * 4000, ("0",)), (3 * 4000, ("0", "1")), (100, ())):
        cache = OutputCache(model, [model[2].weight], memory=memory)
        with torch.no_grad(), cache.active():
            cache.begin(0, records=True)
            model(x)
        assert cache.reused == names


def shifted_accuracy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0] + 1).argmax(-1) == batch[1]).double().mean()


@pytest.mark.parametrize(("accuracy_fn", "passes"), [(None, 1), (accuracy, 1), (shifted_accuracy, 2)])
def test_a_full_plane_takes_one_backbone_pass_per_point(accuracy_fn: object, passes: int) -> None:
    backbone: list[Any] = []
    head: list[Any] = []
    model = nn.Sequential(
        Counting(nn.Linear(6, 8), backbone.append),
        Counting(SparseMoE(8, 3, num_experts=4, expert_width=5), head.append),
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
        accuracy_fn=accuracy_fn,
    )
    assert plane.routing_flips is not None
    num_flipped = int((plane.routing_flips > 0).sum())
    assert num_flipped > 15
    # three points are also evaluated plainly, with the loss at fixed routing and the accuracy; the center has its
    # own accuracy pass
    validations = 3 * (2 if accuracy_fn is None else 3) + (accuracy_fn is accuracy)
    validations += 1 if accuracy_fn is None else 2  # the center is measured with a graph too
    assert len(backbone) == 25 * passes + validations
    assert len(head) == 25 * passes + num_flipped + validations


def test_accuracies_equal_those_of_a_separate_analysis() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(50, 6), torch.randint(3, (50,))
    for function in (accuracy, shifted_accuracy):
        line = loss_landscape(
            model, cross_entropy, [(x, y)], direction1=3 * random_direction(model), accuracy_fn=function, num_points=5
        )
        # as a loss, the same function shares no pass
        alone = loss_landscape(model, function, [(x, y)], direction1=3 * random_direction(model), num_points=5)
        assert line.accuracies is not None and torch.equal(line.accuracies, alone.losses)
        assert line.accuracies.unique().numel() > 2


def test_calls_inside_a_recorded_call_are_not_recorded() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    cache, x = OutputCache(model, model.parameters(), shares_accuracy=True), torch.ones(1, 2)
    with torch.no_grad(), cache.active():
        with cache.loss_pass():
            first = model(x)
        with cache.accuracy_pass():
            assert model(x) is first
            assert model[0](x) is not model[0](x)
        with cache.accuracy_pass():  # released after one use
            assert model(x) is not first
    assert model(x) is not first


class Peeking(nn.Module):
    """A module that reads a weight of the head once it has moved far."""

    def __init__(self, head: nn.Linear, far: float) -> None:
        super().__init__()
        self.layer, self.far = nn.Linear(6, 8), far
        self.seen = lambda: head.weight[0, 0].detach()
        self.start = float(self.seen())

    def forward(self, x: Tensor) -> Tensor:
        moved = abs(float(self.seen()) - self.start)
        return self.layer(x) + (moved if moved > self.far else 0.0)


class Adapter(nn.Module):
    """A backbone with a part that another module turns on."""

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
    """A model that edits the list returned by its backbone."""

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
def test_the_center_equals_a_plain_evaluation(kind: Any) -> None:
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
    assert (line.not_reused == DIFFERENT) == (kind is Difference)


@pytest.mark.parametrize("kind", [Difference, Edited])
def test_the_loss_at_fixed_routing_equals_a_plain_evaluation(kind: Any) -> None:
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
        assert f"fixed routing: {DIFFERENT}" in line.not_shared
        assert line.not_shared in line.summary()
    else:
        assert line.not_shared == ""


def averaged(model: nn.Module, batch: Batch) -> Tensor:
    """The accuracy of different weights than those of the loss."""
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
    model.is_flipped = True
    found = accuracy(model, batch)
    model.is_flipped = False
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
    model[0].running_mean.fill_(2.0)
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
def test_the_accuracy_equals_a_plain_evaluation(make: Callable[[], nn.Module], loss: Any, accuracy_fn: Any) -> None:
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
    assert (f"accuracy: {DIFFERENT}" in line.not_shared) == (make is not Named)


def test_a_module_that_reads_a_moved_weight_disables_reuse_at_the_ends() -> None:
    class Peeking(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.layer, self.reference = nn.Linear(1, 1, bias=False), [head]

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.reference[0].weight.round()

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
        assert line.not_reused == DIFFERENT


def test_a_sweep_validates_along_every_direction() -> None:
    """The output of the backbone changes only along the direction that moves one weight the most."""
    head, batch = nn.Linear(8, 3), (torch.randn(10, 6), torch.randint(3, (10,)))
    steps = [abs(float(normalized_random_direction(head, seed)[0])) for seed in range(4)]
    assert max(steps) != steps[0]
    model = nn.Sequential(Peeking(head, far=sum(sorted(steps)[-2:]) / 2), head)
    options: dict[str, Any] = {"num_directions": 4, "params": ["1"], "num_points": 9}
    found = direction_sweep(model, cross_entropy, [batch], **options)
    model[0].register_forward_hook(lambda *_: None)
    model[0].layer.register_forward_hook(lambda *_: None)  # hooks inside: nothing is reused
    torch.testing.assert_close(
        found.losses, direction_sweep(model, cross_entropy, [batch], **options).losses, rtol=0, atol=0
    )


def test_a_sweep_takes_one_plain_evaluation_per_direction() -> None:
    passes: list[int] = []
    model, batch = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), (torch.randn(10, 6), torch.randint(3, (10,)))

    def loss(m: nn.Module, b: Batch) -> Tensor:
        passes.append(1)
        return cross_entropy(m, b)

    direction_sweep(model, loss, [batch], num_directions=5, params=["1"], num_points=9)
    assert len(passes) == 2 + 5 * (8 + 1)  # the center with a graph and without

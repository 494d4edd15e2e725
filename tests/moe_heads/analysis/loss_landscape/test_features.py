"""What lies before the moved parameters is computed once, and the numbers are those of plain passes to the bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads import SparseMoE
from moe_heads.analysis import loss_landscape, random_direction
from moe_heads.analysis.loss_landscape import features as features_module
from moe_heads.analysis.loss_landscape.features import Features
from moe_heads.analysis.loss_landscape.result import LossLandscapeResult
from tests.support.untouched import untouched

pytestmark = pytest.mark.usefixtures("without_mean_check")

NUM_POINTS, NUM_PROOFS = 7, 3


class Counting(nn.Module):
    """A module around another that notes its passes where `analysis_mode` does not take them back."""

    def __init__(self, module: nn.Module, note: Callable[[int], None]) -> None:
        super().__init__()
        self.module, self.note = module, note

    def forward(self, x: Tensor) -> Tensor:
        self.note(len(x))
        return self.module(x)


def convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3), nn.Flatten())


def data() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 1, 6, 6), torch.randint(3, (size,))) for size in (5, 3)]


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def line(model: nn.Module, batches: Any, params: Any, **options: Any) -> LossLandscapeResult:
    direction = random_direction(model, params=params)
    return loss_landscape(
        model, cross_entropy, batches, direction1=direction, params=params, num_points=NUM_POINTS, **options
    )


def both(
    model: nn.Module, params: Any, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[LossLandscapeResult, ...]:
    batches = data()
    with untouched(model):
        kept = line(model, batches, params, **options)
    with monkeypatch.context() as patched:
        patched.setattr(features_module, "largest_below", lambda *args: [])
        plain = line(model, batches, params, **options)
    assert torch.equal(kept.losses, plain.losses)
    return kept, plain


def test_a_backbone_runs_once_and_a_few_times_more_to_prove_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    model = nn.Sequential(
        Counting(convolutions(), lambda size: calls.append(size)), SparseMoE(12, 3, num_experts=4, expert_width=5)
    )
    kept, plain = both(model, ["1"], monkeypatch, fixed_routing=False)
    assert kept.reused[0] == "0"
    assert kept.not_reused == "" and plain.reused == ()
    # the center and the plain passes of three points; then the run without features
    center = [5, 5, 3, 3]  # with a graph and without
    assert calls == center + [5, 3] * NUM_PROOFS + center + [5, 3] * (NUM_POINTS - 1)
    assert plain.losses.unique().numel() == NUM_POINTS


@pytest.mark.parametrize("params", [["3"], ["3.bias"], ["1"], ["0.weight"], ["5.router"], ["5.experts"], None])
def test_any_part_of_a_flat_model(params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*convolutions(), SparseMoE(12, 3, num_experts=4, expert_width=5))
    kept, _ = both(model, params, monkeypatch)
    expected = {None: (), "0.weight": (), "1": ("0",), "3": ("0",), "3.bias": ("0",)}
    if params is None or params[0] in expected:
        # a batch norm is changed in place by the ReLU behind it, so it is computed anew
        assert kept.reused == expected[None if params is None else params[0]]
    else:
        assert {"0", "3"} <= set(kept.reused)


def test_a_branch_beside_what_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fixed, self.moving, self.last = nn.Linear(36, 4), nn.Linear(36, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(1)
            return self.last(self.fixed(flat) * self.moving(flat))

    kept, _ = both(Branches(), ["moving"], monkeypatch)
    assert kept.reused == ("fixed",)


def test_a_module_that_changes_more_than_its_output_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
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

    kept = line(Model(), data()[:1], ["head"])
    assert kept.reused == ()
    assert kept.not_reused == "the loss was another one with kept features than without"
    assert "Nothing was computed once: the loss was another one" in kept.summary()


def test_random_layers_draw_as_if_nothing_were_kept(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_loss_that_takes_a_gradient_makes_whole_passes() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3))

    def penalized(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = batch[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(m(x), batch[1]), x)
        return gradient.square().sum()

    direction = random_direction(model, params=["3"])
    found = loss_landscape(model, penalized, data(), direction1=direction, params=["3"], num_points=3)
    assert found.losses.unique().numel() == 3
    assert found.reused == ()


def test_no_more_is_kept_than_there_is_memory_for() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 2))
    x = torch.randn(100, 10)
    for memory, names in ((2 * 4000, ("0",)), (3 * 4000, ("0", "1")), (100, ())):
        features = Features(model, [model[2].weight], memory)
        with torch.no_grad(), features.active():
            features.begin(0, records=True)
            model(x)
        assert features.names == names

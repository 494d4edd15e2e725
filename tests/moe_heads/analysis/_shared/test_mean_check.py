"""Losses that are not means over samples cause a warning."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.analysis import sharpness
from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.mean_check import CutDependence, check_mean
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.progress import Progress
from tests.support.untouched import untouched


def checked(
    loss_fn: Any, batches: Any, model: nn.Module | None = None, **options: Any
) -> tuple[CutDependence, list[str]]:
    warned: list[str] = []
    model = model or nn.Linear(4, 3)
    with untouched(model):
        found = check_mean(model, loss_fn, Batches.of(batches, **options), progress=Progress(on_warning=warned.append))
    return found, warned


def data(size: int = 20) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 4, generator=generator), torch.arange(size) % 3) for _ in range(3)]


def cross_entropy(**options: Any) -> Any:
    return lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], **options)


def info_nce(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    z1, z2 = F.normalize(model(batch[0]), dim=1), F.normalize(model(batch[0] + 0.1), dim=1)
    return F.cross_entropy(z1 @ z2.T / 0.1, torch.arange(len(z1)))


def dice(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    p, t = model(batch[0]).sigmoid(), F.one_hot(batch[1], 3)
    return 1 - 2 * (p * t).sum() / (p.sum() + t.sum())


@pytest.mark.parametrize("size", [2, 7, 100])
def test_a_mean_is_not_remarked_upon(size: int) -> None:
    assert checked(cross_entropy(), data(size)) == (CutDependence(0.0), [])


@pytest.mark.parametrize("loss_fn", [cross_entropy(weight=torch.tensor([1.0, 1.0, 50.0])), info_nce, dice])
def test_a_loss_that_is_not_a_mean_causes_one_warning_with_the_size_and_the_remedy(loss_fn: Any) -> None:
    batches = [(x, torch.where(torch.arange(20) < 5, 2, y % 2)) for x, y in data()]
    found, warned = checked(loss_fn, batches)
    assert found.size is not None and found.size > 1e-4 and not found.may_cut
    assert len(warned) == 1
    assert (
        "differs by" in warned[0] and "%" in warned[0] and "batch_weight_fn" in warned[0] and "-100).sum()" in warned[0]
    )


@pytest.mark.parametrize("size", [2, 7, 100])
def test_a_sum_has_its_own_warning(size: int) -> None:
    found, warned = checked(cross_entropy(reduction="sum"), data(size))
    assert found.is_sum and len(warned) == 1
    assert f"the loss of {size} samples is the sum of the losses of its halves" in warned[0]


def test_ignored_labels_cause_a_warning_and_weights_are_the_remedy() -> None:
    batches = [(x, torch.where(torch.arange(20) < 7, -100, y)) for x, y in data()]
    assert checked(cross_entropy(), batches)[0].size
    found = checked(cross_entropy(), batches, batch_weight_fn=lambda batch: (batch[1] != -100).sum())
    assert found == (CutDependence(0.0), [])


@pytest.mark.parametrize("scale", [15.0, 30.0])
def test_losses_near_zero_are_no_false_alarm(scale: float) -> None:
    """Of float32 logits of some tens a loss of 4e-7 is mostly rounding."""
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(scale * torch.eye(3))
    batches = [(F.one_hot(torch.arange(50) % 3, 3) + 0.01 * torch.rand(50, 3), torch.arange(50) % 3) for _ in range(4)]
    found, warned = checked(cross_entropy(), batches, model)
    assert not warned and found.size is None
    assert "too close to zero" in found.reason


@pytest.mark.parametrize(
    ("loss_fn", "batches", "reason"),
    [
        (cross_entropy(reduction="sum"), data(1), "one sample each"),
        (lambda m, b: m(b[0]), data(), "not a scalar"),
        (lambda m, b: m(b[0]).view(20, 3).mean(), data(), "half a batch"),
        (lambda m, b: m(b["x"]).sum(), [{"x": torch.randn(4, 4), "names": list("abcd")}], "one row a sample"),
        (lambda m, b: F.dropout(m(b[0])).sum(), data(), "random numbers"),
    ],
)
def test_what_cannot_be_checked_has_a_reason(loss_fn: Any, batches: Any, reason: str) -> None:
    found, warned = checked(loss_fn, batches)
    assert found.size is None and not warned
    assert reason in found.reason


class Counting(nn.Linear):
    """Carries a state on."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


def test_a_state_is_not_taken_for_a_dependence() -> None:
    found, warned = checked(lambda m, b: m(b[0]).square().mean(), data(), Counting(4, 3))
    assert not warned and "repeat" in found.reason


def test_a_module_that_needs_whole_batches_is_not_cut() -> None:
    def whole_only(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).view(20, 3), batch[1])

    batches = Batches.of(data())
    found = check_mean(nn.Linear(4, 3), whole_only, batches)
    assert found.halves_fail and not found.may_cut

    def full(index: int, batch: Any) -> None:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(MemoryError, match="a batch of 20 samples that cannot be cut"):
        list(Microbatches(batches, torch.device("cpu"), Progress()).evaluate(full))


def test_halving_causes_a_warning_if_it_changes_the_loss() -> None:
    warned: list[str] = []
    batches, progress = Batches.of(data()), Progress(on_warning=warned.append)
    check_mean(nn.Linear(4, 3), info_nce, batches, progress=progress)

    def full(index: int, batch: Any) -> int:
        if len(batch[0]) > 10:
            raise torch.OutOfMemoryError("full")
        return 0

    list(Microbatches(batches, torch.device("cpu"), progress).evaluate(full))
    assert len(warned) == 2 and "was halved. The loss depends" in warned[1]


def test_a_plain_function_warns_once_and_not_again_for_the_same_batches() -> None:
    batches = Batches.of(data())
    with pytest.warns(UserWarning, match="loss_fn: expected the mean over the samples of a batch") as caught:
        sharpness(nn.Linear(4, 3), info_nce, batches, num_eigenvalues=1)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharpness(nn.Linear(4, 3), info_nce, batches, num_eigenvalues=1)

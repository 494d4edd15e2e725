"""Batches are halved when memory runs out, and the result is the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads import SparseMoE
from moe_heads.analysis import (
    expert_utilization,
    loss_landscape,
    random_direction,
    sharpness,
)
from moe_heads.analysis._shared.microbatches import Microbatches, is_out_of_memory, unless_out_of_memory
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis.sharpness.hessian import HessianOperator
from moe_heads.analysis.sharpness.hessian.batch_gradients import BatchGradients

CPU = torch.device("cpu")


class Narrow(nn.Module):
    """Has memory for a few samples at a time only."""

    def __init__(self, room: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.head = SparseMoE(6, 3, num_experts=4, expert_width=4)
        self.room = room
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.room is not None and len(x) > self.room:
            raise torch.OutOfMemoryError(f"no room for {len(x)} samples")
        return self.head(self.body(x))


@contextmanager
def no_room(model: Narrow, room: int) -> Iterator[None]:
    model.room = room
    yield
    model.room = None


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = (9, 4, 7)
    x = [torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in sizes]
    return [(part, torch.randint(3, (len(part),), generator=generator)) for part in x]


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_a_batch_is_halved_until_it_fits_and_stays_halved() -> None:
    batches = Microbatches([torch.arange(9.0), torch.arange(2.0)], CPU, Progress())
    tried: list[int] = []

    def mean(index: int, batch: Tensor) -> float:
        tried.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("full")
        return float(batch.mean())

    for _ in range(2):
        found = list(batches.evaluate(mean))
        assert [size for size, _ in found] == [2, 2, 2, 3, 2]
        assert sum(size * value for size, value in found) == 36 + 1
    assert tried == [9, 4, 2, 2, 5, 2, 3, 2, *(2, 2, 2, 3, 2)]
    assert batches.num_samples == 11


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(1, 2), "not enough memory for a single sample"),
        ({"x": torch.zeros(4, 2), "names": ["a"] * 4}, "a batch of 4 samples that cannot be cut"),
    ],
)
def test_an_indivisible_batch_raises_an_error_with_the_remedy(batch: Any, message: str) -> None:
    def fail(index: int, batch: Any) -> None:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(
        MemoryError, match=rf"{message} \(full\)\. Analyze a smaller model, use fewer samples at a time"
    ):
        list(Microbatches([batch], CPU, Progress()).evaluate(fail))


def test_other_errors_pass() -> None:
    def fail(index: int, batch: Any) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        list(Microbatches([torch.zeros(4)], CPU, Progress()).evaluate(fail))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        unless_out_of_memory(lambda: fail(0, None))


def test_the_cpus_allocator_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("not enough memory of it"))
    assert unless_out_of_memory(lambda: torch.empty(2**60, dtype=torch.uint8)) is None


@pytest.mark.parametrize("room", [1, 3])
@pytest.mark.parametrize("graph_memory", [0, None])
def test_products_are_the_same_with_little_memory(room: int, graph_memory: int | None) -> None:
    model = Narrow().eval()
    whole = HessianOperator(model, cross_entropy, data())
    v = torch.randn(whole.num_parameters, dtype=torch.float64)
    with no_room(model, room):
        narrow = HessianOperator(model, cross_entropy, data(), graph_memory=graph_memory)
        product = narrow.matvec(v)
    assert narrow.mode == "rebuilt"
    torch.testing.assert_close(product, whole.matvec(v), rtol=1e-12, atol=1e-14)


def test_graphs_are_given_up_when_memory_runs_out_between_products(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Narrow().eval()
    hessian = HessianOperator(model, cross_entropy, data())
    v = torch.randn(hessian.num_parameters, dtype=torch.float64)
    expected = hessian.matvec(v)
    assert hessian.mode == "kept"

    real = BatchGradients.differentiate

    def full(gradients: BatchGradients, gradient: Any, tangents: Any, *, retain_graph: bool) -> Any:
        if retain_graph:
            raise torch.OutOfMemoryError("full")
        return real(gradients, gradient, tangents, retain_graph=retain_graph)

    monkeypatch.setattr(BatchGradients, "differentiate", full)
    torch.testing.assert_close(hessian.matvec(v), expected, rtol=1e-12, atol=1e-14)
    assert hessian.mode == "rebuilt"


@pytest.mark.slow
def test_analyses_are_the_same_with_little_memory() -> None:
    model = Narrow()
    direction = random_direction(model)

    def analyze() -> list[dict[str, float]]:
        return [
            sharpness(model, cross_entropy, data(), num_eigenvalues=2).metrics(),
            loss_landscape(model, cross_entropy, data(), direction1=direction, num_points=5).metrics(),
            expert_utilization(model, data()).metrics(),
        ]

    expected = analyze()
    with no_room(model, 2):
        found = analyze()
    for narrow, whole in zip(found, expected, strict=True):
        # the checks take more memory than a product
        assert whole.keys() - narrow.keys() <= {"derivative_error", "cut_dependence"}
        assert narrow == pytest.approx({key: whole[key] for key in narrow}, rel=1e-9, abs=1e-10)


def test_flips_are_counted_against_the_center_when_memory_runs_out_on_the_way() -> None:
    """The center is measured in whole batches; the halves of later points are compared with those of the center."""
    model = Narrow()
    direction = random_direction(model)
    expected = loss_landscape(model, cross_entropy, data(), direction1=direction, alphas=[-2.0, 0.0, 2.0])
    calls: list[int] = []

    def filling(m: Narrow, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(1)
        m.room = 4 if len(calls) > 3 else None
        return cross_entropy(m, batch)

    found = loss_landscape(model, filling, data(), direction1=direction, alphas=[-2.0, 0.0, 2.0])
    assert expected.routing_flips is not None
    assert found.routing_flips is not None
    assert expected.routing_flips.max() > 0
    torch.testing.assert_close(found.routing_flips, expected.routing_flips)
    torch.testing.assert_close(found.losses, expected.losses)

"""Batches with known numbers of samples and weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads.analysis import loss_landscape, perturbation_sharpness, routing_response, sharpness
from moe_heads.analysis._shared.batch_list import Batches, halves_of
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis.sharpness.pyhessian import pyhessian_sharpness

CPU = torch.device("cpu")
X, Y = torch.zeros(6, 4), torch.zeros(6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batches", "got"),
    [
        (X, r"one tensor of shape \(6, 4\)\. Pass \[tensor\]"),
        ((X, X), r"a tuple with tensors of shapes .* Pass \[\(X, y\)\]"),
        ((X, Y), r"a tuple with tensors of shapes \(6, 4\), \(6,\), which is one batch\. Pass \[\(X, y\)\]"),
        ([X, Y], r"a list with tensors of shapes .* Pass \[\(X, y\)\]"),
        ([X, None], r"a list with tensors .* Pass \[\(X, y\)\]"),
        ({"x": X, "y": Y}, r"a mapping with the keys \['x', 'y'\]\. Pass \[batch\]"),
    ],
)
def test_one_batch_in_place_of_the_list_raises_an_error(batches: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"batches: expected a list of batches, got {got}"):
        sharpness(nn.Linear(4, 3), lambda m, b: m(b).mean(), batches)


def test_lists_of_tensors_of_one_kind_and_tuples_of_batches_are_data() -> None:
    assert Batches.of([X, X[:2]]).sizes == (6, 2)
    assert Batches.of(((X, Y), (X[:2], Y[:2]))).num_samples == 8


def test_the_number_of_samples_may_be_given() -> None:
    time_first = (torch.zeros(30, 8, 5), torch.zeros(8))
    data = Microbatches([time_first], CPU, Progress(), batch_size_fn=lambda batch: len(batch[1]))
    assert (data.num_samples, data.total_weight, data.sizes) == (8, 8, [8])
    for bad in (lambda batch: "many", lambda batch: -1, lambda batch: 2.5):
        with pytest.raises(ValueError, match=r"batch_size_fn: expected the number of samples of batches\[0\], got"):
            Batches.of([time_first], bad)


def test_known_numbers_are_taken_over() -> None:
    known = Batches([torch.zeros(512)], [7])
    assert Microbatches(known, CPU, Progress()).num_samples == 7
    assert Batches.of(known) is known
    assert Batches.of(known, None, lambda batch: 3.0).weights == (3.0,)
    assert not known.pieces[0].is_divisible  # which of the 512 rows belong to a sample is not known


def test_halves_weigh_as_much_as_the_whole() -> None:
    tokens = Batches.of([torch.tensor([1.0, 0, 0, 3])], None, lambda batch: batch.sum())
    assert [half.weight for half in halves_of(tokens.pieces[0], tokens.weight_fn)] == [1, 3]
    alike = Batches.of([torch.zeros(4)], None, lambda batch: 1.0)
    assert [half.weight for half in halves_of(alike.pieces[0], alike.weight_fn)] == [0.5, 0.5]


@pytest.mark.parametrize("value", [-1.0, float("nan"), "heavy"])
def test_bad_weights_raise_an_error(value: Any) -> None:
    with pytest.raises(ValueError, match="batch_weight_fn: expected a finite number of at least 0"):
        Batches.of([X], None, lambda batch: value)


def test_zero_weights_raise_an_error() -> None:
    with pytest.raises(ValueError, match="batch_weight_fn: expected a weight above 0 for at least one batch"):
        Batches.of([X], None, lambda batch: 0)


class Linear(nn.Linear):
    """Logits of a linear layer."""


def token_mean(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])


def num_labels(batch: dict[str, Tensor]) -> Tensor:
    return (batch["labels"] != -100).sum()


def test_weights_make_a_mean_over_labels_independent_of_the_cut() -> None:
    torch.manual_seed(0)
    model = Linear(4, 3).double()
    x, labels = torch.randn(24, 4, dtype=torch.float64), torch.arange(24) % 3
    labels[:8] = -100  # the first batch has no label at all
    labels[9:13] = -100
    whole = [{"x": x, "labels": labels}]
    cut = [{"x": x[start : start + 8], "labels": labels[start : start + 8]} for start in (0, 8, 16)]
    direction = torch.randn(15, dtype=torch.float64)

    def found(batches: Any, num_samples: int) -> list[float]:
        weighted: dict[str, Any] = {"batch_weight_fn": num_labels}
        spectrum = sharpness(model, token_mean, batches, num_eigenvalues=2, **weighted)
        line = loss_landscape(model, token_mean, batches, direction1=direction, num_points=3, **weighted)
        response = routing_response(model, token_mean, batches, direction, [0.5], **weighted)
        rise = perturbation_sharpness(model, token_mean, batches, num_draws=2, num_steps=1, **weighted)
        samples = (spectrum.num_samples, line.num_samples, response.num_samples, rise.num_samples)
        assert set(samples) == {num_samples}
        return [*spectrum.eigenvalues, spectrum.trace, *line.losses.tolist(), *response.losses_free, rise.worst]

    assert found(cut, 16) == pytest.approx(found(whole, 24), rel=1e-7)


def test_pyhessian_weights_alike() -> None:
    pytest.importorskip("pyhessian")
    model = Linear(4, 3)
    x, labels = torch.randn(20, 4), torch.arange(20) % 3
    labels[:7] = -100
    whole = [{"x": x, "labels": labels}]
    cut = [{"x": x[:10], "labels": labels[:10]}, {"x": x[10:], "labels": labels[10:]}]
    options: dict[str, Any] = {"num_eigenvalues": 1, "density": False, "batch_weight_fn": num_labels}
    one, two = (pyhessian_sharpness(model, token_mean, batches, **options) for batches in (whole, cut))
    assert one.eigenvalues[0] == pytest.approx(two.eigenvalues[0], rel=1e-3)


class Graphs:
    """Moves in place, as some libraries do."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: Any) -> "Graphs":
        self.x = self.x.to(device)
        return self


def test_objects_are_moved_and_the_callers_stays() -> None:
    given = Graphs(torch.zeros(3))
    data = Microbatches([given], torch.device("meta"), Progress(), batch_size_fn=lambda batch: 3)
    assert next(iter(data)).x.device.type == "meta"
    assert given.x.device.type == "cpu"

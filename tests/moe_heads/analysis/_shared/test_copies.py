"""In-place changes of a batch by a user's function do not affect later evaluations."""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from moe_heads.analysis import direction_sweep, loss_landscape, perturbation_sharpness, sharpness
from moe_heads.analysis._shared.copies import own_copy
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.progress import Progress


def test_everything_inside_is_a_copy() -> None:
    labels = torch.arange(3)
    packed = pack_sequence([torch.zeros(3), torch.zeros(2)])
    batch = {"x": [torch.zeros(3), {"y": torch.zeros(3)}], "ids": labels, "labels": labels, "packed": packed, "n": 1}
    copied = own_copy(batch)
    assert copied["labels"] is copied["ids"] is not labels  # one tensor in two places
    copied["x"][1].pop("y")
    copied["x"][0].add_(1)
    copied["packed"].data.add_(1)
    assert float(batch["x"][0].sum()) == 0 and list(batch["x"][1]) == ["y"]
    assert float(packed.data.sum()) == 0


def test_an_input_that_requires_a_gradient_stays_a_leaf() -> None:
    x = torch.zeros(3, requires_grad=True)
    copied = own_copy((x,))[0]
    assert copied.is_leaf and copied.requires_grad and copied is not x


def test_what_cannot_be_copied_is_handed_on() -> None:
    lock = threading.Lock()
    assert own_copy({"lock": lock})["lock"] is lock


def test_each_evaluation_has_a_batch_of_its_own() -> None:
    data = Microbatches([{"x": torch.ones(4), "labels": torch.ones(4)}], torch.device("cpu"), Progress())
    for _ in range(2):
        found = data.evaluate(lambda index, batch: float(batch.pop("labels").mul_(2).sum()))
        assert [value for _, value in found] == [8]


def taking(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    labels = batch.pop("labels")
    return nn.functional.cross_entropy(model(batch["x"].sub_(1.0)), labels)


def plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"] - 1.0), batch["labels"])


def accuracy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["x"].sub_(1.0)).argmax(1) == batch.pop("labels")).double().mean()


def test_losses_that_change_their_batch_give_what_others_give() -> None:
    model = nn.Linear(4, 3).double()
    x = torch.randn(20, 4, dtype=torch.float64)
    batches = [{"x": x[:12], "labels": torch.arange(12) % 3}, {"x": x[12:], "labels": torch.arange(8) % 3}]
    before = x.clone()
    direction = torch.randn(15, dtype=torch.float64)

    def found(loss_fn: Any) -> list[Any]:
        return [
            sharpness(model, loss_fn, batches, num_eigenvalues=2).eigenvalues,
            perturbation_sharpness(model, loss_fn, batches, num_draws=2, num_steps=1).metrics(),
            loss_landscape(model, loss_fn, batches, direction1=direction, num_points=3, accuracy_fn=accuracy).metrics(),
            direction_sweep(model, loss_fn, batches, num_directions=2, num_points=3).metrics(),
        ]

    assert found(taking) == found(plain)
    assert torch.equal(x, before) and list(batches[0]) == ["x", "labels"]

"""Division of the entries of a batch between a request and the loss."""

import dataclasses
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moe_heads.analysis import inference_timing
from moe_heads.analysis._shared.batches import call_model
from moe_heads.analysis.inference_timing.entries import RequestEntries, request_entries
from tests.support.untouched import untouched

QUICK = {"num_runs": 2, "warmup_runs": 0, "batch_sizes": [2]}


class Classifier(nn.Module):
    """Returns the loss first, as the models of transformers, if there are labels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.linear(x if mask is None else x * mask)
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


class Spans(nn.Module):
    """Has a loss if both positions are given, and a loss of its own in any case."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, start: Any = None, end: Any = None, mask: Any = None) -> tuple[Tensor | None, ...]:
        logits = self.linear(x if mask is None else x * mask)
        loss = None if start is None or end is None else cross_entropy(logits, start) + cross_entropy(logits, end)
        return loss, logits, logits.square().mean()


class LastToken(nn.Module):
    """Without targets, computes the logits of the last token only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.linear(x if targets is not None else x[:, -1:])
        return logits, None if targets is None else cross_entropy(logits.flatten(0, 1), targets.flatten())


class Conditional(nn.Module):
    """Its labels are a condition of the output."""

    def forward(self, x: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return x if class_labels is None else x + class_labels.unsqueeze(-1)


class Anything(nn.Module):
    """Takes any entry, and passes them on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Classifier()

    def forward(self, **entries: Tensor) -> dict[str, Tensor]:
        return self.inner(**entries)


X, LABELS = torch.randn(3, 4), torch.tensor([0, 1, 2])


def division(model: nn.Module, batch: object) -> tuple[object, dict[str, str]]:
    found = request_entries(model.eval(), batch, call_model)
    return found.given, dict(found.left_out)


@pytest.mark.parametrize("model", [Classifier(), Anything()])
def test_labels_stay_out(model: nn.Module) -> None:
    batch = {"x": X, "mask": torch.ones(3, 4), "labels": LABELS}
    with untouched(model.eval()):
        assert division(model, batch) == (("x", "mask"), {"labels": "for the loss"})
        assert division(model, UserDict(batch)) == (("x", "mask"), {"labels": "for the loss"})


def test_entries_without_which_the_output_has_no_loss_stay_out_whatever_their_names() -> None:
    batch = {"x": X, "start": LABELS, "mask": torch.ones(3, 4), "end": LABELS, "index": LABELS}
    given, left_out = division(Spans(), batch)
    assert given == ("x", "mask")
    assert left_out == {"start": "for the loss", "end": "for the loss", "index": "no parameter of forward"}
    tokens = {"x": torch.randn(3, 5, 4), "targets": torch.zeros(3, 5, dtype=torch.long)}
    assert division(LastToken(), tokens) == (("x",), {"targets": "for the loss"})


def test_labels_that_change_the_output_are_an_input() -> None:
    assert division(Conditional(), {"x": X, "class_labels": LABELS}) == (("x", "class_labels"), {})


def test_entries_of_a_dataclass_and_of_a_tuple() -> None:
    @dataclasses.dataclass
    class Batch:
        x: Tensor
        labels: Tensor

    found = request_entries(Classifier(), Batch(X, LABELS), call_model)
    assert list(found.of(Batch(X, LABELS))) == ["x"]
    pair = request_entries(nn.Linear(4, 3), (X, LABELS, LABELS), call_model)
    assert pair.text == "the first entry of each batch went in, 2 others stayed out"
    assert len(pair.of((X, LABELS, LABELS))) == 1
    assert request_entries(nn.Linear(4, 3), X, call_model) == RequestEntries(None, {}, "the whole batch went in")
    assert request_entries(nn.Linear(4, 3), [X], call_model).text == "the whole batch went in"


def test_a_forward_fn_gets_the_whole_batch() -> None:
    batch, seen = {"x": X, "labels": LABELS}, []

    def forward(model: nn.Module, batch: dict) -> object:
        seen.append(list(batch))
        return model(**batch)

    timing = inference_timing(Classifier(), batch, forward_fn=forward, **QUICK)
    assert seen[0] == ["x", "labels"]
    assert timing.requests.entries == "forward_fn gets the whole batch"


class NeedsLabels(nn.Module):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return (x - labels).square().mean()


class LossOnly(nn.Module):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {} if labels is None else {"loss": x.sum()}


class RaisesWithoutLabels(nn.Module):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            raise RuntimeError("decoder inputs are missing.\nMore")
        return x * labels


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (NeedsLabels(), r"ValueError: batch: expected an entry .*"),
        (LossOnly(), "one that returns no tensor"),
        (RaisesWithoutLabels(), "RuntimeError: decoder inputs are missing"),
    ],
)
def test_a_model_that_needs_its_labels_is_named_before_anything_is_timed(model: nn.Module, reason: str) -> None:
    name = type(model).__name__
    message = rf"example_batch: .* without 'labels', got {reason}\. {name} needs its labels\. Pass forward_fn"
    with pytest.raises(ValueError, match=message):
        inference_timing(model, {"x": X, "labels": X}, **QUICK)


def test_a_batch_that_does_not_fit_is_the_error_of_the_model() -> None:
    with pytest.raises(ValueError, match=r"example_batch: .* that the model accepts, got .* RuntimeError"):
        inference_timing(Classifier(), {"x": torch.randn(3, 9), "labels": LABELS}, **QUICK)


def test_the_loss_is_not_timed_and_the_summary_names_the_entries() -> None:
    seen = []

    class Watched(Classifier):
        def forward(self, x: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> dict[str, Tensor]:
            seen.append(labels is None)
            return super().forward(x, mask, labels)

    timing = inference_timing(Watched(), {"x": X, "labels": LABELS}, **QUICK)
    # two passes find the entries, and one without labels checks them
    assert seen[0] is False
    assert all(seen[1:])
    assert "x went in; labels stayed out (for the loss)" in timing.summary()
    assert timing.requests.left_out == {"labels": "for the loss"}

"""Check of the labels of the first batch."""

from typing import Any

import pytest
import torch

from moe_heads.analysis.expert_utilization.label_check import LabelCheck
from moe_heads.analysis.expert_utilization.label_entry import labels_of
from moe_heads.routing import Routing

X, Y = torch.randn(6, 5), torch.tensor([0, 1, 2, 0, -1, 2])


def check(label_fn: Any = labels_of, names: Any = None) -> LabelCheck:
    return LabelCheck(label_fn, names, frozenset())


def routing(num_rows: int, rows_per_sample: int = 1) -> Routing:
    return Routing.from_probs(torch.rand(num_rows, 4).softmax(-1), rows_per_sample=rows_per_sample)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ((X, Y, Y), {}, "expected only one entry that can be the labels"),
        ((X, X), {}, "expected integers"),
        ((X, Y), {"label_fn": lambda batch: batch["y"]}, "label_fn: failed with TypeError"),
        ((X, Y), {"names": ["a", "b"]}, r"expected classes 0 to 1 \(2 class_names\), got 2 labels up to 2"),
        ((X,), {}, "the batches have no labels"),
    ],
)
def test_before_the_model_runs(batch: Any, options: dict[str, Any], message: str) -> None:
    checked = check(**options)
    reason = checked.before(batch)
    assert reason is not None
    with pytest.raises(ValueError, match=message):
        raise ValueError(reason.text)
    assert checked.after({"head": [routing(7)]}, ()) is None  # one reason is enough


@pytest.mark.parametrize("labels", [Y, Y.view(6, 1), torch.full((6,), -100), torch.tensor([-1, 1] * 3), 10**6 + Y])
def test_more_data_may_show_what_one_batch_does_not(labels: torch.Tensor) -> None:
    assert check().before((X, labels)) is None


def test_rows_of_the_model() -> None:
    checked = check()
    assert checked.before((X, Y)) is None
    assert checked.after({"a": [routing(6)], "b": [routing(24, 4)], "c": []}, ()) is None
    reason = checked.after({"a": [routing(6)], "b": [routing(13)], "c": [routing(12)]}, ())
    assert reason is not None
    assert "each of the 13 rows that head 'b' routed" in reason.text
    assert reason.text.endswith("The same holds for 1 more of 3 heads.")
    assert checked.after({"c": [routing(12)]}, {"c"}) is None  # the tokens of a third-party router


def test_the_generators_and_the_batch_are_unchanged() -> None:
    def draw(batch: Any) -> torch.Tensor:
        batch["y"].add_(torch.randint(1, (6,)) + 1)
        return batch.pop("y")

    batch, state = {"x": X, "y": Y.clone()}, torch.get_rng_state()
    assert check(draw).before(batch) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch["y"], Y)

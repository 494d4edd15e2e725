"""Labels that are no classes: one message before training, and everything else in the result."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from moe_heads import SparseMoE
from moe_heads.callbacks import ExpertUtilizationCallback
from tests.support.lightning_models import PlainModule, snapshot, trainer

NO_CLASSES = "no class map and no mutual information"


class OfFirst(PlainModule):
    """Trains on the first entry of a batch, whatever the others are."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch["x"] if isinstance(batch, dict) else batch[0]).square().mean()


class OfRealTokens(PlainModule):
    """Routes x[mask] only."""

    def __init__(self) -> None:
        super().__init__()
        self.head = SparseMoE(5, 3, num_experts=4, expert_width=4)

    def forward(self, inputs: Any) -> Tensor:
        x, mask = inputs
        sums = x.new_zeros(len(x), 3).index_add_(0, mask.nonzero()[:, 0], self.head(x[mask]))
        return sums / mask.sum(1, keepdim=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


X, Y = torch.randn(40, 5), torch.arange(40) % 3
LENGTHS = torch.randint(1, 9, (40,))


def fit(data: list[Any], module: PlainModule | None = None, **options: Any) -> tuple[list[tuple[str, int, str]], Any]:
    """Fit and return the messages, each with its kind and step, and the result of the training split."""
    usage = ExpertUtilizationCallback(splits=["train"], warn=False, on_error="raise", num_permutations=20, **options)
    module = module or OfFirst()
    messages: list[tuple[str, int, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("rank_zero_warn", "rank_zero_info"):
            patch.setattr(
                f"moe_heads.callbacks._utilization_warnings.{name}",
                lambda text, name=name: messages.append((name, int(module.global_step), text)),
            )
        trainer(usage, max_epochs=2).fit(module, DataLoader(data, 16))
    return [each for each in messages if NO_CLASSES in each[2]], usage.results["train"]


@pytest.mark.parametrize(
    ("kind", "data", "options", "message"),
    [
        ("warn", list(zip(X, LENGTHS, Y, strict=True)), {}, "expected only one entry that can be the labels"),
        ("warn", list(zip(X, torch.rand(40), strict=True)), {}, "expected integers"),
        ("warn", list(zip(X, ["cat"] * 40, strict=True)), {}, "expected a tensor of integers, got"),
        ("warn", list(zip(X, Y, strict=True)), {"label_fn": lambda b: b["y"]}, "label_fn: failed with TypeError"),
        ("warn", list(zip(X, Y, strict=True)), {"class_names": ["a", "b"]}, "expected classes 0 to 1 (2 class_names)"),
        ("info", [{"x": x} for x in X], {"forward_fn": lambda m, b: m(b["x"])}, "the batches have no labels"),
    ],
)
def test_one_message_before_the_first_step(kind: str, data: list[Any], options: dict[str, Any], message: str) -> None:
    ((name, step, text),), result = fit(data, **options)
    assert (name, step) == (f"rank_zero_{kind}", 0)
    assert text.startswith(f"expert_utilization: {NO_CLASSES}: ")
    assert message in text
    assert message in result.no_classes
    head = result.heads["head"]
    assert head.num_rows == 40
    assert head.class_map is head.mutual_information is None
    assert float(head.load.sum()) == pytest.approx(1)


def test_rows_that_belong_to_no_sample_are_reported_after_the_first_pass() -> None:
    mask = torch.arange(12) < torch.randint(2, 12, (40, 1))
    data = [((torch.randn(12, 5), m), y) for m, y in zip(mask, Y, strict=True)]
    ((name, step, text),), result = fit(data, OfRealTokens())
    assert (name, step) == ("rank_zero_warn", 1)
    assert "rows that head 'head' routed in a batch" in text
    assert result.heads["head"].num_rows == int(mask.sum())
    of_rows: Any = lambda b: b[1].unsqueeze(1).expand_as(b[0][1])[b[0][1]]  # noqa: E731
    messages, result = fit(data, OfRealTokens(), label_fn=of_rows)
    assert messages == []
    assert result.heads["head"].class_counts.sum(1).tolist() == [2 * int(mask[c == Y].sum()) for c in range(3)]


@pytest.mark.parametrize(
    "labels", [torch.where(X[:, 0] > 0, -1, Y), torch.where(X[:, 0] > 0, 255, Y).to(torch.uint8), Y.unsqueeze(1), Y]
)
def test_usable_labels_cause_no_message(labels: Tensor) -> None:
    messages, result = fit(list(zip(X, labels, strict=True)))
    assert messages == []
    assert len(result.class_names) == 3
    assert result.no_classes == ""


def test_data_that_is_known_to_have_no_labels_causes_no_message() -> None:
    messages, result = fit(list(zip(X, LENGTHS, Y, strict=True)), label_fn=lambda batch: None)
    assert messages == []
    assert "label_fn returned None" in result.no_classes


def test_labels_missing_later_are_reported_once_at_the_end() -> None:
    def label_fn(batch: Any) -> Tensor | None:
        return batch[1] if len(batch[1]) == 16 else None

    ((name, step, text),), _ = fit(list(zip(X, Y, strict=True)), label_fn=label_fn)
    assert (name, step) == ("rank_zero_warn", 6)
    assert "expected labels for all batches or for none, got 1 of 3" in text


@pytest.mark.parametrize("options", [{"splits": ["val"]}, {"stages": ["test"]}])
def test_labels_that_are_not_analyzed_are_not_checked(options: dict[str, Any]) -> None:
    module = PlainModule()
    steps: list[int] = []

    def label_fn(batch: Any) -> Tensor:
        steps.append(module.global_step)
        return batch[1]

    data: DataLoader[Any] = DataLoader(list(zip(X, Y, strict=True)), 16)
    trainer(ExpertUtilizationCallback(warn=False, label_fn=label_fn, **options)).fit(module, data, data)
    assert set(steps) == ({3} if "splits" in options else set())


def test_the_check_changes_nothing_in_the_training() -> None:
    def label_fn(batch: Any) -> Tensor:
        torch.rand(3)
        batch[0].zero_()
        return batch.pop(1)

    states = []
    for callbacks in ([], [ExpertUtilizationCallback(stages=["fit"], splits=["train"], label_fn=label_fn)]):
        torch.manual_seed(0)
        module = PlainModule()
        data: DataLoader[Any] = DataLoader(list(zip(X, Y, strict=True)), 16, shuffle=True)
        trainer(*callbacks).fit(module, data)
        states.append(snapshot(module))
    assert torch.equal(states[0]["torch_rng"], states[1]["torch_rng"])
    for name, value in states[0]["state"].items():
        assert torch.equal(value, states[1]["state"][name]), name


def test_without_a_trainer() -> None:
    model = nn.Sequential(SparseMoE(5, 3, num_experts=4))
    usage = ExpertUtilizationCallback(forward_fn=lambda m, b: m(b[0]), num_permutations=0)
    with pytest.warns(UserWarning, match=f"{NO_CLASSES}: batch: expected only one entry") as caught:
        results = usage.analyze(model, train=[(X, LENGTHS, Y)], test=[(X, LENGTHS, Y)])
    assert len([w for w in caught if NO_CLASSES in str(w.message)]) == 1
    assert all("expected only one entry" in result.no_classes for result in results.values())


@pytest.mark.parametrize(("option", "value"), [("label_fn", 3), ("ignore_index", "255")])
def test_wrong_arguments_raise_an_error_at_once(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option}: expected"):
        ExpertUtilizationCallback(**{option: value})

"""Accuracy without each expert, and the images that each expert receives."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads import Routing, SoftMoE, SparseMoE, ablate
from moe_heads.analysis.expert_utilization.examples import ExpertExamples, images_of
from moe_heads.analysis.expert_utilization.function import expert_utilization
from tests.support.untouched import untouched

HEADS = {
    "soft": lambda: SoftMoE(8, 3, num_experts=4, expert_width=4),
    "sparse": lambda: SparseMoE(8, 3, num_experts=4, expert_width=4),
}


class Last(nn.Module):
    """Returns what its head returned."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU()), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Inside(Last):
    """Has something behind the head."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.01 * x[:, :3]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model.eval()(x).argmax(-1) == y).double().mean())


@pytest.mark.parametrize("kind", list(HEADS))
@pytest.mark.parametrize("place", [Last, Inside])
def test_is_the_accuracy_of_a_model_with_the_smaller_head(kind: str, place: type[Last]) -> None:
    model = place(HEADS[kind]()).eval()
    x, y = torch.randn(90, 5), torch.randint(3, (90,))
    batches = list(zip(x.split([40, 50]), y.split([40, 50]), strict=True))
    with untouched(model):
        found = expert_utilization(model, batches, ablation=True).heads["head"].ablation
    assert found is not None
    assert found.accuracy == pytest.approx(accuracy(model, x, y))
    head: Any = model.head
    for expert in range(4):
        smaller = copy.deepcopy(model)
        smaller.head = ablate(head, [expert])
        assert found.without[expert] == pytest.approx(accuracy(smaller, x, y))
        right, now = model(x).argmax(-1) == y, smaller(x).argmax(-1) == y
        difference = right.double() - now.double()
        assert found.without_stderr[expert] == pytest.approx(float(difference.std(correction=0)) / 90**0.5)
        assert found.contribution[expert] == pytest.approx(float(difference.mean()))


def test_only_the_head_runs_again_where_it_is_the_last() -> None:
    counts = {}
    for place in (Last, Inside):
        calls: list[int] = []
        model = place(HEADS["sparse"]())
        model.body.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        expert_utilization(model, [(torch.randn(9, 5), torch.randint(3, (9,)))], ablation=True)
        counts[place] = len(calls)
    assert counts == {Last: 2, Inside: 6}


def test_statistics_do_not_count_the_passes_without_an_expert() -> None:
    model, batch = Inside(HEADS["sparse"]()), (torch.randn(9, 5), torch.randint(3, (9,)))
    plain, ablated = (expert_utilization(model, [batch], ablation=ablation) for ablation in (False, True))
    assert ablated.heads["head"].num_rows == plain.heads["head"].num_rows == 9
    assert torch.equal(ablated.load["head"], plain.load["head"])


class Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x)


def foreign(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Routing:
    return Routing.from_probs(output.softmax(-1), output.topk(1).indices)


def test_a_router_of_somebody_else_has_everything_but_an_ablation() -> None:
    model, batch = Foreign(), (torch.randn(30, 5), torch.randint(3, (30,)))
    result = expert_utilization(model, [batch], adapters={"gate": foreign})
    top = model(batch[0]).argmax(-1)
    assert torch.equal(result.load["head"], torch.bincount(top, minlength=3).double() / 30)
    assert result.heads["head"].ablation is None
    with pytest.raises(ValueError, match="supports the removal of an expert, got a model without a head of moe_heads"):
        expert_utilization(model, [batch], adapters={"gate": foreign}, ablation=True)


def test_tokens_of_a_router_that_sees_them_one_after_the_other() -> None:
    """As those of most language models do."""

    class Flat(Foreign):
        def forward(self, x: Tensor) -> Tensor:
            return self.gate(x.flatten(0, 1)).view(*x.shape[:2], -1).mean(1)

    model, x, y = Flat(), torch.randn(6, 4, 5), torch.randint(3, (6,))
    head = expert_utilization(model, [(x, y)], adapters={"gate": foreign}).heads["head"]
    top = model.gate(x).argmax(-1)
    expected = torch.stack([torch.bincount(top[y == c].flatten(), minlength=3) for c in range(int(y.max()) + 1)])
    assert head.num_rows == 24
    assert torch.equal(head.class_counts, expected)


def test_a_head_that_cannot_lose_one_costs_the_others_nothing() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = HEADS["sparse"](), SparseMoE(3, 3, num_experts=1, k=1, expert_width=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    heads = expert_utilization(Two(), [(torch.randn(9, 8), torch.randint(3, (9,)))], ablation=True).heads
    assert heads["second"].ablation is None
    assert heads["first"].ablation is not None


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (Last(HEADS["soft"]()), torch.randn(3, 5), "ablation: expected data with labels for the .*, got none"),
        (
            Last(SparseMoE(8, 3, num_experts=2, expert_width=4)),
            (torch.randn(3, 5), torch.zeros(3, dtype=torch.int64)),
            "removal of an expert, got 'head', which does not .experts: expected at least 2 remaining experts, got 1",
        ),
        (
            nn.Sequential(SoftMoE(5, 3, num_experts=2, expert_width=4), nn.Flatten(0)),
            (torch.randn(3, 5), torch.zeros(3, dtype=torch.int64)),
            r"ablation: expected a model that returns logits \(3, C\) of C ≥ 2 .*, got \(9,\)",
        ),
        (
            Last(SparseMoE(8, 1, num_experts=4, expert_width=4)),
            (torch.randn(3, 5), torch.zeros(3, dtype=torch.int64)),
            r"ablation: expected a model that returns logits \(3, C\) of C ≥ 2 classes.*, got \(3, 1\)",
        ),
    ],
)
def test_where_it_cannot_be_had(model: nn.Module, batch: Any, message: str) -> None:
    with untouched(model), pytest.raises(ValueError, match=message):
        expert_utilization(model, [batch], ablation=True)


def routing_of(gates: list[list[float]], tokens: int = 1) -> Routing:
    probs = torch.tensor(gates)
    return Routing(logits=probs.clamp_min(1e-9).log(), probs=probs, rows_per_sample=tokens)


def pictures(*numbers: int) -> Tensor:
    """An image for each number, with one bright pixel."""
    return torch.eye(4)[list(numbers)].view(len(numbers), 1, 1, 4)


def numbers_of(examples: ExpertExamples) -> list[list[int]]:
    return examples.images.float().argmax(-1).flatten(1).tolist()


def test_each_expert_shows_the_images_of_its_highest_gates() -> None:
    routing = routing_of([[0.1, 0.9], [0.7, 0.3], [1.0, 0.0]])
    found = ExpertExamples.of(routing, pictures(0, 1, 2), torch.tensor([5, 6, 7]), 2)
    assert numbers_of(found) == [[2, 1], [0, 1]]
    assert found.labels.tolist() == [[7, 6], [5, 6]]
    more = ExpertExamples.of(routing_of([[0.8, 0.2]]), pictures(3), None, 2)
    merged = found.merged(more, 2)
    assert numbers_of(merged) == [[2, 3], [0, 1]]
    assert merged.labels.tolist() == [[7, -1], [5, 6]]
    assert merged.gates.flatten().tolist() == pytest.approx([1.0, 0.8, 0.9, 0.3])


def test_a_sample_of_tokens_counts_by_its_best_token() -> None:
    routing = routing_of([[0.5, 0.5], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]], tokens=2)
    assert numbers_of(ExpertExamples.of(routing, pictures(1, 2), None, 1)) == [[1], [2]]


def test_images_are_kept_small_and_of_one_size() -> None:
    routing = routing_of([[1.0] + 39 * [0.0]])
    large = ExpertExamples.of(routing, torch.randn(1, 3, 256, 128), None, 4)
    assert large.images.shape == (40, 1, 3, 64, 32)
    assert large.images.dtype == torch.uint8
    for other in (torch.randn(1, 3, 10, 10), torch.randn(1, 1, 64, 32)):
        assert large.merged(ExpertExamples.of(routing, other, None, 4), 4).images.shape == (40, 2, 3, 64, 32)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(2, 2, 4, 4),
            r"image_fn: expected images \(B, C, H, W\) with one or three channels.*\(2, 2, 4, 4\)",
        ),
        (torch.zeros(2, 4, 4), r"image_fn: expected images .*, got \(2, 4, 4\)"),
        ([1, 2], "image_fn: expected images .*, got list"),
        (torch.zeros(3, 1, 4, 4), r"image_fn: expected an image for each of the 2 samples, got \(3, 1, 4, 4\)"),
    ],
)
def test_images_that_cannot_be(images: Any, message: str) -> None:
    model = SparseMoE(5, 3, num_experts=4, expert_width=4)
    with pytest.raises(ValueError, match=message):
        expert_utilization(model, [torch.randn(2, 5)], image_fn=lambda batch: images, num_examples=1)


def test_a_model_that_returns_its_logits_in_a_mapping() -> None:
    class Named(Last):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x)}

    model, batch = Named(HEADS["sparse"]()).eval(), (torch.randn(9, 5), torch.randint(3, (9,)))
    found = expert_utilization(model, [batch], ablation=True).heads["head"].ablation
    assert found is not None and found.accuracy == pytest.approx(
        float((model(batch[0])["logits"].argmax(-1) == batch[1]).double().mean())
    )


def test_what_can_be_shown() -> None:
    image = torch.zeros(2, 3, 4, 4)
    assert images_of((image, None)) is image
    assert images_of(image) is image
    for other in (torch.zeros(2, 4), torch.zeros(2, 5, 4, 4), {"x": image}, ()):
        assert images_of(other) is None


def test_examples_come_out_of_the_analysis_whatever_the_batches() -> None:
    model = nn.Sequential(nn.Flatten(), SparseMoE(16, 3, num_experts=4, expert_width=4))
    x, y = torch.randn(30, 1, 4, 4), torch.randint(3, (30,))
    whole = expert_utilization(model, [(x, y)], num_examples=3).heads["1"].examples
    parts = (
        expert_utilization(model, list(zip(x.split(7), y.split(7), strict=True)), num_examples=3).heads["1"].examples
    )
    assert whole is not None and parts is not None
    assert whole.images.shape == (4, 3, 1, 4, 4)
    torch.testing.assert_close(parts.gates, whole.gates)
    assert torch.equal(parts.images, whole.images)
    assert expert_utilization(model, [(x, y)]).heads["1"].examples is None

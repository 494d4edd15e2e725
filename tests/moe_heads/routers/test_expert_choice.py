"""Expert choice against a loop over experts."""

import math

import pytest
import torch

from moe_heads import SparseMoE
from moe_heads.routers import ExpertChoiceRouter


@pytest.mark.parametrize("k", [0.5, 1.0, 2.0, 4])
def test_every_expert_takes_its_best_rows(k: float) -> None:
    router = ExpertChoiceRouter(5, 4, k=k).eval()
    x = torch.randn(10, 5)
    routing, probs = router(x), router.gate(x).softmax(-1)
    size = min(10, math.ceil(10 * k / 4))
    for expert in range(4):
        best = probs[:, expert].sort(descending=True)
        assert torch.equal(routing.rows[expert], best.indices[:size])
        torch.testing.assert_close(routing.weights[expert], best.values[:size])
    assert routing.stats().counts.tolist() == [size] * 4
    assert torch.equal(routing.dropped, (routing.gates == 0).all(-1))
    assert routing.stats().num_dropped == routing.dropped.sum()


def test_tokens_compete_within_their_sample() -> None:
    head = SparseMoE(5, 3, num_experts=4, router=ExpertChoiceRouter(5, 4, k=1)).eval()
    x = torch.randn(6, 8, 5)
    torch.testing.assert_close(head(x), torch.cat([head(sample.unsqueeze(0)) for sample in x]))
    assert head(x, return_routing=True).routing.stats().counts.tolist() == [12] * 4


def test_a_single_row_is_taken_by_every_expert() -> None:
    assert ExpertChoiceRouter(5, 4, k=1)(torch.randn(1, 5)).selected.all()


def test_margin_is_the_smallest_change_of_a_probability_that_changes_the_choice() -> None:
    router = ExpertChoiceRouter(5, 3, k=1).eval()
    routing = router(torch.randn(9, 5))
    probs, selected = routing.probs, routing.selected
    for row in range(9):
        distances = []
        for expert in range(3):
            others = torch.arange(9) != row
            inside = selected[row, expert]
            rivals = probs[others, expert][selected[others, expert] != inside]
            best = rivals.max() if inside else rivals.min()
            distances.append((probs[row, expert] - best).abs())
        torch.testing.assert_close(routing.margin[row], torch.stack(distances).min())


@pytest.mark.parametrize("rows_per_sample", [1, 4])
def test_an_empty_batch(rows_per_sample: int) -> None:
    routing = ExpertChoiceRouter(5, 4)(torch.randn(0, 5), rows_per_sample)
    assert routing.gates.shape == (0, 4)
    assert routing.stats().num_rows == 0

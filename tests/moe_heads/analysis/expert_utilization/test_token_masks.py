import re
from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads import Routing
from moe_heads.analysis.expert_utilization.token_masks import TokenMasks

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
REAL = MASK.bool()


@dataclass
class Batch:
    input_ids: Tensor
    attention_mask: Tensor


def routed(num_rows: int) -> Routing:
    probs = torch.rand(num_rows, 5)
    return Routing.from_probs(probs, probs.topk(2).indices)


def masked(batch: Any, name: str = "layers.0", has_encoder: bool = False) -> Routing:
    masks = TokenMasks(None, has_encoder)
    masks.begin(batch)
    return masks.applied({name: [routed(12)]})[name][0]


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.zeros(3, 4), "attention_mask": MASK},
        UserDict(input_ids=torch.zeros(3, 4), attention_mask=MASK.bool()),
        Batch(torch.zeros(3, 4), MASK),
        SimpleNamespace(attention_mask=MASK.float()),
        ({"input_ids": torch.zeros(3, 4), "attention_mask": MASK}, torch.zeros(3)),
        {"text": {"input_ids": torch.zeros(3, 4), "attention_mask": MASK}, "labels": torch.zeros(3)},
        {"attention_mask": MASK * 2},  # packed sequences number their tokens' sequences from 1
    ],
)
def test_an_attention_mask_is_found(batch: Any) -> None:
    routing = masked(batch)
    assert torch.equal(routing.mask, REAL.flatten()) and routing.rows_per_sample == 4
    assert int(routing.stats().num_rows) == int(REAL.sum())


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(3, 4),
        (torch.zeros(3, 4), torch.zeros(3)),
        {"input_ids": torch.zeros(3, 4)},
        {"attention_mask": torch.zeros(3, 1, 4, 4)},
        {"attention_mask": torch.where(REAL, 0.0, -torch.inf)},  # what is added to the scores of attention
        {"attention_mask": None},
        {"attention_mask": {"full": MASK}},
    ],
)
def test_what_is_no_mask_of_tokens_masks_nothing(batch: Any) -> None:
    assert masked(batch).mask is None


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ({"attention_mask": torch.zeros(3, 1, 4, 4)}, r"has the shape \(3, 1, 4, 4\), not \(B, T\)"),
        ({"attention_mask": torch.where(REAL, 0.0, -torch.inf)}, "is added to the scores of attention"),
        ({"attention_mask": torch.zeros(3, 4)}, "is added to the scores of attention"),
        ({"attention_mask": torch.ones(4, 4).tril()}, "says which token sees which"),
        ({"attention_mask": [1, 0]}, "is a list, not a tensor"),
        (({"attention_mask": MASK}, {"attention_mask": MASK}), "has 2 entries called attention_mask"),
        ({"a": {"attention_mask": MASK}, "b": {"attention_mask": MASK}}, "has 2 entries called attention_mask"),
    ],
)
def test_a_mask_that_cannot_be_used_is_said(batch: Any, reason: str) -> None:
    masks = TokenMasks(None)
    masks.begin(batch)
    assert masks.applied({"a": [routed(12)]})["a"][0].mask is None
    assert re.search(reason, masks.unused["attention_mask"])


def test_rows_with_time_first() -> None:
    probs = torch.rand(4, 3, 5)  # (T, B, E)
    masks = TokenMasks(None)
    masks.begin({"attention_mask": MASK})
    routing = masks.applied({"a": [Routing.from_probs(probs, probs.topk(2).indices)]})["a"][0]
    assert torch.equal(routing.mask.view(4, 3), REAL.t()) and routing.rows_per_sample == 1


def test_rows_that_are_no_tokens() -> None:
    masks = TokenMasks(None)
    masks.begin({"attention_mask": MASK})
    found = masks.applied({
        "pooled": [routed(3)],
        "real": [routed(8)],
        "other": [routed(9)],
        "tokens": [routed(12)] * 2,
    })
    assert [routing.mask is None for passes in found.values() for routing in passes] == [True] * 3 + [False] * 2
    assert masks.unused == {"other": "the attention_mask (3, 4) does not fit the 9 rows of router 'other'"}


def test_a_mask_of_the_model_itself_stays() -> None:
    own = Routing.from_probs(torch.rand(12, 3))
    own = Routing(own.logits, own.probs, mask=torch.ones(12, dtype=torch.bool))
    masks = TokenMasks(None)
    masks.begin({"attention_mask": MASK})
    assert masks.applied({"a": [own]})["a"][0] is own


def test_a_decoder_has_a_mask_of_its_own() -> None:
    batch = {"attention_mask": MASK}
    assert masked(batch, "encoder.block.0.mlp", has_encoder=True).mask is not None
    assert masked(batch, "decoder.block.0.mlp", has_encoder=True).mask is None
    # a model that is only a decoder has tokens as any other
    assert masked(batch, "decoder.block.0.mlp").mask is not None
    batch["decoder_attention_mask"] = MASK.flip(0)
    assert torch.equal(masked(batch, "decoder.block.0.mlp", has_encoder=True).mask, REAL.flip(0).flatten())
    both = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
    masks = TokenMasks.of(both, None)  # experts in the decoder only
    masks.begin({"attention_mask": MASK})
    assert masks.applied({"decoder.mlp": [routed(12)]})["decoder.mlp"][0].mask is None


def given(mask: Any) -> TokenMasks:
    return TokenMasks(lambda batch: mask)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK, r"mask_fn: expected a bool tensor \(B, T\), True for real tokens, got \(3, 4\), torch.int64"),
        (REAL[0], r"got \(4,\), torch.bool"),
        ([True], "got list"),
        (REAL[:, :3], r"expected a mask of the shape \(3, 4\) of input_ids, got \(3, 3\)"),
    ],
)
def test_a_function_that_returns_no_mask(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given(mask).begin({"input_ids": torch.zeros(3, 4)})


def test_a_function_with_a_mask_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"a mask of the 3 samples of the batch, got \(2, 4\)"):
        given(REAL[:2]).begin((torch.zeros(3, 4),))
    masks = given(REAL)
    masks.begin((torch.zeros(3, 4),))
    with pytest.raises(ValueError, match=r"tokens that router 'a' routes, got \(3, 4\) for 15 rows"):
        masks.applied({"a": [routed(15)]})
    masks = given(None)
    masks.begin((torch.zeros(3, 4),))
    assert masks.applied({"a": [routed(15)]})["a"][0].mask is None

from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

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


def masked(batch: Any, name: str = "layers.0", num_rows: int = 12, **others: int) -> Routing:
    masks = TokenMasks(None)
    masks.begin(batch)
    names = {name: num_rows, **others}
    return masks.applied({key: [routed(rows)] for key, rows in names.items()})[name][0]


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.zeros(3, 4), "attention_mask": MASK},
        UserDict(input_ids=torch.zeros(3, 4), attention_mask=MASK.bool()),
        Batch(torch.zeros(3, 4), MASK),
        SimpleNamespace(attention_mask=MASK.float()),
        ({"input_ids": torch.zeros(3, 4), "attention_mask": MASK}, torch.zeros(3)),
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
    assert masks.unused == {"other": ((3, 4), 9)}


def test_a_mask_of_the_model_itself_stays() -> None:
    own = Routing.from_probs(torch.rand(12, 3))
    own = Routing(own.logits, own.probs, mask=torch.ones(12, dtype=torch.bool))
    masks = TokenMasks(None)
    masks.begin({"attention_mask": MASK})
    assert masks.applied({"a": [own]})["a"][0] is own


def test_a_decoder_has_a_mask_of_its_own() -> None:
    names = {"encoder.block.0.mlp": 12, "decoder.block.0.mlp": 12}
    batch = {"attention_mask": MASK}
    assert masked(batch, "encoder.block.0.mlp", 12, **names).mask is not None
    assert masked(batch, "decoder.block.0.mlp", 12, **names).mask is None
    # a model that is only a decoder has tokens as any other
    assert masked(batch, "decoder.block.0.mlp").mask is not None
    batch["decoder_attention_mask"] = MASK.flip(0)
    assert torch.equal(masked(batch, "decoder.block.0.mlp", 12, **names).mask, REAL.flip(0).flatten())


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

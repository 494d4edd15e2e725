"""Loss and data of a Trainer of transformers, against means over tokens written by hand in float64."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.data import IterableDataset, WeightedRandomSampler

from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.mean_check import check_mean
from moe_heads.callbacks._shared.sample import draw_sample
from moe_heads.callbacks._shared.transformers_data import TransformersData
from moe_heads.callbacks._shared.transformers_loss import TransformersLoss
from tests.support.language_models import VOCABULARY, language_model
from tests.support.transformers_runs import gpt2, hf, lines, mixtral, sample, trainer

_BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}

# model, and whether token n predicts label n + 1
MODELS = {
    "GPT-2": (gpt2, True),
    "Mixtral": (mixtral, True),
    "OpenAI GPT": (
        lambda: hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=VOCABULARY)),
        True,
    ),
    "XLNet": (
        lambda: hf.XLNetLMHeadModel(hf.XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=16, vocab_size=VOCABULARY)),
        False,
    ),
    "BERT": (lambda: hf.BertForMaskedLM(hf.BertConfig(**_BERT, vocab_size=VOCABULARY)), False),
    "tokens": (
        lambda: hf.BertForTokenClassification(hf.BertConfig(**_BERT, vocab_size=VOCABULARY, num_labels=VOCABULARY)),
        False,
    ),
    "Switch": (lambda: language_model("SwitchTransformers"), False),
}


def token_mean(model: Any, batch: dict[str, Tensor], *, shifts: bool, smoothing: float = 0.0) -> float:
    """Sum over the tokens, one by one, in float64."""
    with torch.no_grad():
        logits = model(**batch).logits.double()
    found = []
    for scores, row in zip(logits, batch["labels"].tolist(), strict=True):
        pairs = zip(scores[:-1], row[1:], strict=True) if shifts else zip(scores, row, strict=True)
        for score, label in pairs:
            if label != -100:
                logs = score - score.exp().sum().log()
                found.append(-(1 - smoothing) * float(logs[label]) - smoothing * float(logs.mean()))
    return sum(found) / len(found)


@pytest.mark.parametrize("name", MODELS)
def test_the_mean_over_batches_is_that_over_all_tokens(name: str, tmp_path: Path) -> None:
    make, shifts = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    loss = TransformersLoss(trainer(model, tmp_path))
    # batches with few and with many labels; the first is not decided by its first labels
    (together,) = sample(lines(), 12, 12)
    together["labels"][:3, 0] = -100
    batches = [
        {key: value[part] for key, value in together.items()} for part in (slice(0, 3), slice(3, 5), slice(5, 12))
    ]
    weights = [loss.weight(batch) for batch in batches]
    labels = together["labels"][:, 1:] if shifts else together["labels"]
    assert sum(weights) == int((labels != -100).sum())
    with torch.no_grad():
        mean = sum(weight * float(loss(model, dict(batch))) for weight, batch in zip(weights, batches, strict=True))
    assert mean / sum(weights) == pytest.approx(token_mean(model, together, shifts=shifts), rel=1e-6)
    assert check_mean(model, loss, Batches([together], [12], weight_fn=loss.weight)).size == 0.0


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs["logits"][:, :-1].reshape(-1, VOCABULARY)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum") / num_items_in_batch


def test_a_custom_loss_and_label_smoothing(tmp_path: Path) -> None:
    (batch,) = sample(lines(), 12, 12)
    model = gpt2().eval()
    custom = TransformersLoss(trainer(model, tmp_path, parts={"compute_loss_func": summed}))
    smoothed = TransformersLoss(trainer(model, tmp_path, label_smoothing_factor=0.3))
    for loss, smoothing in ((custom, 0.0), (smoothed, 0.3)):
        expected = token_mean(model, batch, shifts=True, smoothing=smoothing)
        assert float(loss(model, dict(batch)).detach()) == pytest.approx(expected, rel=1e-6)
        assert loss.weight(batch) == int((batch["labels"][:, 1:] != -100).sum())
        assert check_mean(model, loss, Batches([batch], [12], weight_fn=loss.weight)).size == 0.0


def test_the_loss_of_the_router_is_no_mean_over_tokens(tmp_path: Path) -> None:
    (batch,) = sample(lines(), 12, 12)
    plain, with_router = mixtral().eval(), mixtral(output_router_logits=True, router_aux_loss_coef=0.5).eval()
    for model in (plain, with_router):
        model.model.layers[0].mlp.gate.weight.data.mul_(100)  # uneven loads
    losses = [TransformersLoss(trainer(model, tmp_path)) for model in (plain, with_router)]
    batches = Batches([batch], [12], weight_fn=losses[0].weight)
    assert check_mean(plain, losses[0], batches).size == 0.0
    with pytest.warns(UserWarning, match="expected the mean over the samples of a batch, got a loss that differs by"):
        found = check_mean(with_router, losses[1], batches)
    assert found.size is not None and found.size > 1e-4


def test_weights_without_labels_of_tokens(tmp_path: Path) -> None:
    loss = TransformersLoss(trainer(gpt2(), tmp_path))
    assert loss.weight({"input_ids": torch.zeros(5, 3)}) == 5
    assert loss.weight({"input_ids": torch.zeros(5, 3), "labels": torch.tensor([0, 1, -100, 2, 1])}) == 4
    assert loss.weight({"input_ids": torch.zeros(5, 3), "labels": torch.rand(5)}) == 5
    # labels that the collator has shifted
    assert loss.weight({"labels": torch.ones(2, 4), "shift_labels": torch.tensor([[1, 2, -100, 3]])}) == 3
    # labels all alike do not show whether they are shifted; the name of the loss does
    assert loss.weight({"input_ids": torch.zeros(2, 4), "labels": torch.ones(2, 4, dtype=torch.long)}) == 6


class Tokenizer:
    """What DataCollatorForLanguageModeling needs of a tokenizer."""

    mask_token, mask_token_id, pad_token_id, padding_side = "[M]", 3, 0, "right"
    _pad_token = "[P]"
    deprecation_warnings: ClassVar[dict[str, bool]] = {}

    def __len__(self) -> int:
        return VOCABULARY

    def pad(self, examples: list[Any], **options: Any) -> dict[str, Tensor]:
        return {name: torch.stack([torch.as_tensor(each[name]) for each in examples]) for name in examples[0]}

    def get_special_tokens_mask(self, ids: list[int], already_has_special_tokens: bool = True) -> list[int]:
        return [int(token == 0) for token in ids]

    def convert_tokens_to_ids(self, token: str) -> int:
        return 3


def drawn(data: TransformersData, split: Any = "train", number: int = 8) -> list[Any]:
    return list(draw_sample(split, data.loader_of(split), number, 4, 0).batches)


def test_a_collator_with_a_generator_is_left_as_it_was(tmp_path: Path) -> None:
    collator = transformers.DataCollatorForLanguageModeling(Tokenizer(), mlm_probability=0.4, seed=3)
    examples = [{key: line[key] for key in ("input_ids", "attention_mask")} for line in lines()]
    run = trainer(gpt2(), tmp_path, parts={"train_dataset": examples, "data_collator": collator})
    data = TransformersData(run)
    collator(examples[:2])  # the training has begun
    state = collator.generator.get_state()
    found = []
    for _ in range(2):
        with data.generators_fixed():
            found.append(drawn(data))
        assert torch.equal(collator.generator.get_state(), state)
    assert all(torch.equal(one["labels"], two["labels"]) for one, two in zip(*found, strict=True))
    assert (found[0][0]["labels"] == -100).any() and (found[0][0]["labels"] != -100).any()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(lines())


def test_streams_columns_samplers_and_several_data_sets(tmp_path: Path) -> None:
    with_text = [{**line, "text": "not for the model"} for line in lines()]
    parts: dict[str, Any] = {"train_dataset": with_text, "eval_dataset": {"first": lines(4), "second": lines(8)}}
    data = TransformersData(trainer(gpt2(), tmp_path, parts=parts))
    assert set(drawn(data)[0]) == {"input_ids", "attention_mask", "labels"}
    evaluated = draw_sample("val", data.loader_of("val"), 8, 4, 0)
    assert evaluated.num_samples == 4 and "the other 1 of 2 loaders are left out" in evaluated.description
    assert data.loader_of("test") is None

    parts = {"train_dataset": Stream(), "eval_dataset": None}
    data = TransformersData(trainer(gpt2(), tmp_path, parts=parts, max_steps=2))
    assert torch.equal(drawn(data)[0]["input_ids"], torch.stack([line["input_ids"] for line in lines(4)]))
    assert data.loader_of("val") is None

    class Weighted(transformers.Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return WeightedRandomSampler([1.0, *[0.0] * 11], 8)

    batches = drawn(TransformersData(trainer(gpt2(), tmp_path, cls=Weighted)))
    assert all(torch.equal(row, lines(1)[0]["input_ids"]) for batch in batches for row in batch["input_ids"])

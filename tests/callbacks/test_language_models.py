"""ExpertUtilizationCallback on language models of transformers: no argument, padding, compiled, checkpointed."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning import pytorch as pl
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moe_heads import collect_routing
from moe_heads.analysis import expert_utilization
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.expert_utilization.training import TrainingRouters
from moe_heads.callbacks import ExpertUtilizationCallback
from tests.support.language_models import VOCABULARY, language_model
from tests.support.lightning_models import trainer
from tests.support.processes import run_on_ranks

# name, and whether its layers are checkpointed
QUICK = (("Mixtral", True), ("SwitchTransformers", False))
ALL = ("Mixtral", "Olmoe", "Qwen3Moe", "DeepseekV3", "GptOss", "Glm4Moe", "Llama4", "SwitchTransformers")
OTHERS = [(name, checkpointed) for name in ALL for checkpointed in (False, True) if (name, checkpointed) not in QUICK]

Batch = dict[str, Tensor]


class LanguageModel(pl.LightningModule):
    def __init__(self, name: str, is_checkpointed: bool = False) -> None:
        super().__init__()
        self.model = language_model(name)
        if is_checkpointed:
            model = self.model  # the name is that of transformers 5.23, the default that of older ones
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def forward(self, **batch: Tensor) -> Tensor:
        return self.model(**batch).logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def lines(model: nn.Module, num_lines: int = 12, length: int = 9) -> list[Batch]:
    found = []
    for number in range(num_lines):
        ids = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(number))
        found.append({"input_ids": ids, "labels": ids})
    return found


def fit(module: LanguageModel, loader: Any, **options: Any) -> tuple[ExpertUtilizationCallback, pl.Trainer, list[str]]:
    options = {"splits": ["train"], "num_permutations": 0, "num_examples": 0, "warn": False, "seed": 0} | options
    callback = ExpertUtilizationCallback(**options)
    run = trainer(callback, max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, loader)
    return callback, run, [str(w.message) for w in caught if "expert_utilization" in str(w.message)]


def counted_by_hand(module: LanguageModel, batches: list[Batch]) -> dict[str, Tensor]:
    """Count each sample alone, so without padding."""
    total: dict[str, Tensor] = {}
    for batch in batches:
        with collect_routing(module) as collection, torch.no_grad():
            module.model(**batch)
        for name, stats in collection.stats.items():
            total[name] = total.get(name, torch.zeros_like(stats.counts)) + stats.counts
    return total


@pytest.mark.parametrize(
    ("name", "is_checkpointed"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_no_argument_is_needed(name: str, is_checkpointed: bool) -> None:
    module = LanguageModel(name, is_checkpointed).train()
    batches = lines(module.model)
    # one batch, so that the counts of the epoch are those of the weights before the step
    expected = LanguageModel(name).train()
    callback, _, messages = fit(module, DataLoader(batches, batch_size=12))
    stacked = {key: torch.stack([batch[key] for batch in batches]) for key in batches[0]}
    counts = counted_by_hand(expected, [stacked])
    assert set(callback.history) == set(counts)
    for layer, stats in callback.history.items():
        assert torch.equal(stats[0].counts, counts[layer])
        assert stats[0].entropy.isfinite() and stats[0].margin >= 0
    result = callback.results["train"]
    assert set(result.heads) == set(counts) and not result.notes
    assert not [text for text in messages if "router" in text or "layers" in text]


def padded(module: LanguageModel) -> tuple[list[Batch], Batch]:
    """Samples of many lengths, alone and as a batch with 37 % padding."""
    torch.manual_seed(3)
    lengths = [16, 4, 7, 16, 12, 9, 10, 7]
    alone = [{"input_ids": torch.randint(3, VOCABULARY, (1, n))} for n in lengths]
    for batch in alone:
        batch["labels"] = batch["input_ids"]
    ids = torch.zeros(8, 16, dtype=torch.int64)
    mask = torch.zeros(8, 16, dtype=torch.int64)
    for row, batch in enumerate(alone):
        ids[row, : lengths[row]], mask[row, : lengths[row]] = batch["input_ids"][0], 1
    assert round(100 * (1 - sum(lengths) / 128)) == 37
    return alone, {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("name", ["Mixtral", pytest.param("DeepseekV3", marks=pytest.mark.slow)])
def test_padding_changes_no_statistic(name: str) -> None:
    module = LanguageModel(name)
    alone, together = padded(module)
    counts = counted_by_hand(LanguageModel(name), alone)
    callback, _, _ = fit(module, DataLoader([together], batch_size=None))
    for layer, stats in callback.history.items():
        assert torch.equal(stats[0].counts, counts[layer]) and int(stats[0].num_rows) == 81
    with_padding = expert_utilization(module, [together], num_permutations=0)
    without = expert_utilization(module, alone, num_permutations=0)
    for layer, head in with_padding.heads.items():
        other = without.heads[layer]
        assert torch.equal(head.load, other.load) and head.num_rows == other.num_rows == 81
        torch.testing.assert_close(head.importance, other.importance)
        for quantity in ("entropy", "margin", "effective_experts_per_row", "mutual_information"):
            assert getattr(head, quantity) == pytest.approx(getattr(other, quantity), rel=1e-4)
        torch.testing.assert_close(head.class_map, other.class_map, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_a_mask_by_another_name() -> None:
    module = LanguageModel("Mixtral")
    alone, together = padded(module)
    named = {"ids": together["input_ids"], "is_padding": together["attention_mask"] == 0, "labels": together["labels"]}

    class Renamed(LanguageModel):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return self.model(input_ids=batch["ids"], labels=batch["labels"]).loss

        def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
            return self.model(input_ids=ids).logits

    callback, _, _ = fit(
        Renamed("Mixtral"), DataLoader([named], batch_size=None), mask_fn=lambda batch: ~batch["is_padding"]
    )
    counts = counted_by_hand(module, alone)
    assert all(torch.equal(stats[0].counts, counts[layer]) for layer, stats in callback.history.items())

    wrong = Renamed("Mixtral")
    before = [parameter.clone() for parameter in wrong.parameters()]
    for mask_fn, message in {
        lambda batch: batch["is_padding"][
            :, 1:
        ]: r"tokens that router 'model.model.layers.0.mlp' routes, got \(8, 15\)",
        lambda batch: batch["labels"]: "expected a bool tensor",
        lambda batch: ~batch["is_padding"][:2]: r"8 samples of the batch, got \(2, 16\)",
    }.items():
        with pytest.raises(ValueError, match=message):
            fit(wrong, DataLoader([named], batch_size=None), mask_fn=mask_fn)
    # before the first step
    assert all(torch.equal(old, new) for old, new in zip(before, wrong.parameters(), strict=True))


@pytest.mark.slow
def test_a_compiled_model() -> None:
    module = LanguageModel("Mixtral")
    batches = lines(module.model)
    stacked = {key: torch.stack([batch[key] for batch in batches]) for key in batches[0]}
    counts = counted_by_hand(LanguageModel("Mixtral").train(), [stacked])
    module.model.compile(backend="eager")
    callback, _, _ = fit(module, DataLoader(batches, batch_size=12))
    assert {layer: stats[0].counts.tolist() for layer, stats in callback.history.items()} == {
        layer: expected.tolist() for layer, expected in counts.items()
    }


class Unknown(pl.LightningModule):
    """A layer with experts and a gate that is a linear layer: what it chooses is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 3), nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(-1)
        return torch.stack([self.experts[expert](row) for row, expert in zip(x, chosen.tolist(), strict=True)])


def test_layers_that_are_not_recognized_are_named_once() -> None:
    loader = DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 6)), batch_size=4)
    callback, _, messages = fit(Unknown(), loader)
    (message,) = [text for text in messages if "mixtures of experts" in text]
    assert "2 layers" in message and "'layers.0' (Experts), 'layers.1' (Experts)" in message
    assert "def adapter(module, args, logits):" in message and "adapters = {'layers.*.gate': adapter}" in message
    assert not callback.results["train"].heads and not callback.history
    # the adapter of the message works
    example = message[message.index("    def adapter") :].replace("\n    ", "\n")[4:]
    names: dict[str, Any] = {}
    exec("from moe_heads import Routing\n" + example, names)
    callback, _, messages = fit(Unknown(), loader, adapters=names["adapters"])
    assert set(callback.history) == {"layers.0", "layers.1"} and not messages


def test_an_entry_that_does_not_fit_is_reported_once() -> None:
    module = LanguageModel("Mixtral")
    router_class: Any = type(module.model.model.layers[0].mlp.gate)

    class Reversed(router_class):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
            logits, weights, indices = super().forward(hidden_states)
            return logits.flip(-1), weights, indices

    module.model.model.layers[0].mlp.gate.__class__ = Reversed
    callback, run, messages = fit(module, DataLoader(lines(module.model), batch_size=4))
    (message,) = [text for text in messages if "highest scores" in text]
    assert "router 'model.model.layers.0.mlp'" in message and "This version of Reversed" in message
    assert callback.results["train"].notes and not [key for key in run.callback_metrics if "nan" in key]
    assert all(value.isfinite() for value in run.callback_metrics.values())


def on_rank(rank: int) -> dict[str, Any]:
    model = language_model("DeepseekV3")
    ids = torch.randint(3, VOCABULARY, (2, 5 + rank), generator=torch.Generator().manual_seed(rank))
    with collect_routing(model) as collection:
        routers = TrainingRouters(model, collection, None, 0.01, 0.25)
        routers.begin_batch({"input_ids": ids})
        model(input_ids=ids)
        routers.end_training_batch()
        reports = routers.end_epoch(Ranks(dist.group.WORLD))
        assert not routers.new_notes()
    with collect_routing(model) as own, torch.no_grad():
        model(input_ids=ids)
    return {
        "all": {name: report.stats.counts for name, report in reports.items()},
        "own": {name: stats.counts for name, stats in own.stats.items()},
        "scalars": {name: report.scalars for name, report in reports.items()},
    }


@pytest.mark.slow
def test_two_processes_add_up(tmp_path: Path) -> None:
    first, second = run_on_ranks(on_rank, tmp_path)
    assert first["scalars"] == second["scalars"]
    for name, counts in first["all"].items():
        assert torch.equal(counts, first["own"][name] + second["own"][name]) and int(counts.sum()) == 2 * 2 * (5 + 6)

"""Expert utilization during training: time series, warnings, resumption, and unchanged training."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from moe_heads import Routing, SparseMoE
from moe_heads.callbacks import ExpertUtilizationCallback, SharpnessCallback
from tests.support.events import read_events
from tests.support.lightning_models import PlainModule, loader, trainer

PREFIX = "expert_utilization/epoch/head"


class Epochs(Callback):
    """What was logged at the end of each epoch, and what is true of each at that moment."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Collapsing(PlainModule):
    """Routes everything to one expert."""

    def __init__(self) -> None:
        super().__init__()
        self.head = SparseMoE(8, 3, num_experts=4, k=1, expert_width=4, normalize=False, balance={})
        with torch.no_grad():
            self.head.router.gate.weight.zero_()
            self.head.router.gate.weight[1] = 10.0


def fit(module: LightningModule, *callbacks: Any, **options: Any) -> list[dict[str, float]]:
    epochs = Epochs()
    trainer(*callbacks, epochs, **options).fit(module, loader(), loader(seed=1))
    return epochs.metrics


def utilization(**options: Any) -> ExpertUtilizationCallback:
    return ExpertUtilizationCallback(splits=["train"], **({"warn": False} | options))


def test_what_is_drawn_of_each_epoch() -> None:
    first, second = fit(PlainModule(), utilization(), max_epochs=2)[:2]
    names = {name.removeprefix(f"{PREFIX}/") for name in second if name.startswith(PREFIX)}
    per_expert = {f"load_{expert}" for expert in range(4)}
    balance = {"num_dead_experts", "num_starved_experts", "load_cv", "max_violation", "effective_experts"}
    rows = {"entropy", "margin", "dropped", "nonfinite", "noise_agreement"}
    weights = {"num_inert_experts", "weight_norm_min", "stable_rank_min"}
    assert names == per_expert | balance | rows | weights | {"router_gradient_norm", "routing_flips"}
    assert f"{PREFIX}/routing_flips" not in first  # there is nothing before it
    assert second[f"{PREFIX}/router_gradient_norm"] > 0


def test_flips_are_those_of_the_validation_samples() -> None:
    """The gate is turned round between two epochs: every sample changes its expert."""

    class Turned(PlainModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = SparseMoE(5, 3, num_experts=2, k=1, expert_width=4, noisy=False, balance={})
            self.body = nn.Identity()

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                for parameter in self.head.router.gate.parameters():
                    parameter.data.neg_()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    values = [metrics.get(f"{PREFIX}/routing_flips") for metrics in fit(Turned(), utilization(), max_epochs=3)]
    assert values == [None, 1.0, 0.0]


def test_shuffled_validation_data_cause_a_warning_and_are_not_compared() -> None:
    run = trainer(utilization(), max_epochs=3)
    x, y = torch.randn(40, 5), torch.arange(40) % 3
    with pytest.warns(UserWarning) as caught:
        run.fit(PlainModule(), loader(), DataLoader(TensorDataset(x, y), 16, shuffle=True))
    warned = [
        str(warning.message) for warning in caught if "validation batches differ between epochs" in str(warning.message)
    ]
    assert len(warned) == 1
    assert "shuffle=False" in warned[0]
    assert f"{PREFIX}/routing_flips" not in run.callback_metrics


def test_collapse_and_dead_experts_cause_one_warning() -> None:
    with pytest.warns(UserWarning) as caught:
        fit(Collapsing(), utilization(warn=True), max_epochs=3)
    warned = [str(w.message) for w in caught if str(w.message).startswith("expert_utilization: epoch")]
    (line,) = warned
    assert line.startswith("expert_utilization: epoch 0, head 'head': the routing collapses to 1.0 effective")
    assert "; 3 of 4 experts dead: numbers" in line
    assert line.count("Build the SparseMoE with num_shared_experts=2, noisy=False") == 1


class HiddenByNoise(PlainModule):
    """Its noise is so strong that training sees every expert; without it one of them has all."""

    def __init__(self) -> None:
        super().__init__()
        self.head = SparseMoE(5, 3, num_experts=4, k=1, expert_width=4, noisy=True, balance={})
        self.body = nn.Identity()
        with torch.no_grad():
            self.head.router.gate.weight.zero_()
            self.head.router.gate.bias.copy_(torch.tensor([0.1, 0.0, 0.0, 0.0]))
            self.head.router.noise.weight.zero_()
            self.head.router.noise.bias.fill_(50.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_experts_that_are_used_only_because_of_noise_cause_a_warning() -> None:
    with pytest.warns(UserWarning) as caught:
        fit(HiddenByNoise(), utilization(warn=True), max_epochs=3, num_sanity_val_steps=2)
    (warned,) = [str(w.message) for w in caught if str(w.message).startswith("expert_utilization: epoch")]
    assert warned.startswith(
        "expert_utilization: epoch 1, head 'head': on the validation data, but not in training, the routing collapses"
    )
    assert "3 of 4 experts dead: numbers 1 (0.0% of the fair share of the load), 2 (0.0%), 3 (0.0%)" in warned


def test_without_validation_data_the_training_speaks_alone(recwarn: pytest.WarningsRecorder) -> None:
    usage = utilization(warn=True)
    trainer(usage, max_epochs=1).fit(HiddenByNoise(), loader())
    assert len(usage.history["head"]) == 1
    assert not [w for w in recwarn if "expert_utilization: epoch" in str(w.message)]


def test_no_warning_where_none_is_wanted(recwarn: pytest.WarningsRecorder) -> None:
    fit(Collapsing(), utilization(), max_epochs=1)
    assert not [w for w in recwarn if "expert_utilization: epoch" in str(w.message)]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_history_goes_on_where_a_checkpoint_left_it(tmp_path: Path) -> None:
    first, keeper = utilization(), ModelCheckpoint(tmp_path, save_last=True)
    fit(PlainModule(), first, keeper, max_epochs=2, enable_checkpointing=True)
    again = utilization()
    run = trainer(again, ModelCheckpoint(tmp_path, save_last=True), max_epochs=4, enable_checkpointing=True)
    run.fit(own := PlainModule(), loader(), loader(seed=1), ckpt_path=keeper.last_model_path)
    assert list(again.history["head"]) == [0, 1, 2, 3]
    for epoch, stats in first.history["head"].items():
        assert torch.equal(stats.counts, again.history["head"][epoch].counts)
    early = tmp_path / "early.ckpt"
    run.save_checkpoint(early)
    # a Trainer that goes on with the same model keeps it, another one starts again
    run.fit_loop.max_epochs = 5
    run.fit(own, loader(), loader(seed=1))
    assert list(again.history["head"]) == [0, 1, 2, 3, 4]
    # an evaluation with the weights of an earlier epoch takes nothing from it
    run.validate(PlainModule(), loader(), ckpt_path=early, verbose=False)
    assert list(again.history["head"]) == [0, 1, 2, 3, 4]
    fit(PlainModule(), again, max_epochs=1)
    assert list(again.history["head"]) == [0]


def test_resuming_without_the_callback_causes_no_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    keeper = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    fit(PlainModule(), utilization(), keeper, enable_checkpointing=True)
    run = trainer(ModelCheckpoint(tmp_path, save_last=True), max_epochs=2, enable_checkpointing=True)
    run.fit(PlainModule(), loader(), loader(seed=1), ckpt_path=keeper.last_model_path)
    assert not [w for w in recwarn if "ExpertUtilization" in str(w.message)]


def test_two_of_them_keep_two_histories(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    fit(PlainModule(), utilization(), utilization(name="other"), keeper, enable_checkpointing=True)
    kept = torch.load(keeper.last_model_path, weights_only=True)
    for name in ("expert_utilization", "other"):
        assert list(kept[f"moe_heads/{name}"]["epochs"]["head"]) == [0]


def test_two_of_them_need_names() -> None:
    with pytest.raises(MisconfigurationException, match="Give one of them another name: ExpertUtilizationCallback"):
        fit(PlainModule(), utilization(), utilization())


def test_nonfinite_logits_cause_a_warning_and_leave_no_old_number() -> None:
    class Broken(PlainModule):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * torch.nan if self.training and self.current_epoch == 1 else x)

    usage = utilization(warn=True, stages=["test"])
    with pytest.warns(UserWarning, match="epoch 1, head 'head': 40 of 40 rows had router logits that are nan"):
        first, second = fit(Broken(), usage, max_epochs=2)
    assert (first[f"{PREFIX}/nonfinite"], second[f"{PREFIX}/nonfinite"]) == (0, 1)
    assert math.isnan(second[f"{PREFIX}/load_0"])
    assert list(usage.history["head"]) == [0]


class Compiled(PlainModule):
    def __init__(self) -> None:
        super().__init__()
        self.whole = torch.compile(nn.Sequential(self.body, self.head), backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x)


def test_a_model_whose_hooks_are_not_called_causes_a_warning() -> None:
    torch._dynamo.reset()
    module = Compiled()
    fit(module)
    usage = utilization(stages=["test"])
    with pytest.warns(UserWarning, match="expert_utilization: no router ran in epoch 0") as caught:
        trainer(usage, max_epochs=2).fit(module, loader())
    assert len([w for w in caught if "no router ran" in str(w.message)]) == 1
    assert usage.history == {}


def test_a_tracked_sharpness_is_not_listened_to() -> None:
    """Its passes would be kept with their graphs, by the hundred."""
    usage = utilization()
    seen: list[int] = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert usage._training is not None
            seen.append(sum(map(len, usage._training._routers._collection.routings.values())))

    sharpness = SharpnessCallback(splits=["train"], every_n_epochs=1, num_samples=16)
    fit(PlainModule(), usage, sharpness, Look(), max_epochs=2)
    assert seen == [0, 0]
    assert [int(stats.num_rows) for stats in usage.history["head"].values()] == [40, 40]


def test_a_copy_of_the_model_is_not_listened_to() -> None:
    class Averaging(PlainModule):
        def on_train_batch_end(self, *args: Any) -> None:
            copy.deepcopy(self.head)(torch.randn(3, 8))

    usage = utilization()
    fit(Averaging(), usage)
    assert int(usage.history["head"][0].num_rows) == 40


def test_a_compiled_model_has_the_same_graphs_with_and_without() -> None:
    from torch._dynamo.utils import counters

    def graphs(*callbacks: Any) -> tuple[int, int]:
        torch._dynamo.reset()
        counters.clear()
        whole_batches = loader(num_samples=48)
        trainer(*callbacks, max_epochs=3).fit(Compiled(), whole_batches, loader(num_samples=48, seed=1))
        return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    usage = utilization(stages=["test"])
    assert graphs(usage) == graphs()
    assert graphs()[1] == 0
    assert [int(stats.num_rows) for stats in usage.history["head"].values()] == [48] * 3


class Foreign(PlainModule):
    """Routes with a linear layer, as anybody might."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(5, 4), nn.ModuleList(nn.Linear(5, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return sum(w.unsqueeze(-1) * expert(x) for w, expert in zip(weights.unbind(-1), self.experts, strict=True))


def adapter(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Routing:
    return Routing.from_probs(output.softmax(-1))


def test_a_router_of_another_package() -> None:
    module = Foreign()
    del module.head
    usage = utilization(adapters={"gate": adapter})
    metrics = fit(module, usage, max_epochs=1)[0]
    assert f"{PREFIX}/load_3" in metrics
    assert usage.results["train"].heads["head"].soft


def test_figures_and_tables_in_tensorboard(tmp_path: Path) -> None:
    class Images(PlainModule):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1)[:, :5])

    x, y = torch.randn(40, 1, 4, 4), torch.randint(3, (40,))
    data = DataLoader(TensorDataset(x, y), 16)
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    usage = utilization(ablation=True, num_examples=3)
    trainer(usage, logger=logger).fit(Images(), data, data)
    logger.experiment.flush()
    tags = read_events(Path(logger.log_dir)).Tags()
    figures = ("load", "classes", "coactivation", "what_each_expert_sees")
    assert {f"expert_utilization/train/head/{name}" for name in figures} <= set(tags["images"])
    assert "expert_utilization/epoch/head/load_over_epochs" in tags["images"]
    texts = ("summary", "head/experts")
    assert {f"expert_utilization/train/{name}/text_summary" for name in texts} <= set(tags["tensors"])
    table = usage.results["train"].texts()["head/experts"]
    assert "accuracy lost without it" in table
    assert len(re.findall(r"\n\| \d", table)) == 4


def test_names_of_classes_as_numpy_keeps_them() -> None:
    callback = utilization(class_names=np.array(["cat", "dog", "owl"]), on_error="raise")
    fit(PlainModule(), callback)
    assert callback.results["train"].class_names == ("cat", "dog", "owl")


def test_a_model_without_a_router_writes_nothing(tmp_path: Path) -> None:
    module = PlainModule()
    module.head = nn.Linear(8, 3)
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    trainer(utilization(), logger=logger).fit(module, loader(), loader(seed=1))
    logger.experiment.flush()
    tags = read_events(Path(logger.log_dir)).Tags()
    assert not [tag for kind in ("scalars", "images", "tensors") for tag in tags[kind] if "expert_utilization" in tag]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_fn": 3}, "label_fn: expected a function or None, got 3"),
        ({"warn": "no"}, "warn: expected True or False, got 'no'"),
        ({"ablation": None}, "ablation: expected True or False, got None"),
        ({"dead_below": 1.0}, r"dead_below: expected a number in \[0, 1\), got 1.0"),
        ({"starved_below": -0.1}, r"starved_below: expected a number in \[0, 1\), got -0.1"),
        ({"num_examples": -1}, "num_examples: expected an integer of at least 0, got -1"),
        ({"num_permutations": 1.5}, "num_permutations: expected an integer of at least 0, got 1.5"),
        ({"class_names": [1, 2]}, r"class_names: expected a list of names, got \[1, 2\]"),
        ({"class_names": "cat"}, "class_names: expected a list of names, got 'cat'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertUtilizationCallback(**options)


def test_an_adapter_without_a_match_raises_an_error_before_training() -> None:
    with pytest.raises(ValueError, match="adapters: expected classes or names of modules inside the model"):
        trainer(utilization(adapters={"nowhere": adapter})).fit(PlainModule(), loader())


def test_a_router_that_is_built_in_configure_model() -> None:
    class Late(Foreign):
        def __init__(self) -> None:
            super().__init__()
            del self.gate, self.head

        def configure_model(self) -> None:
            self.gate = nn.Linear(5, 4)

    assert f"{PREFIX}/load_3" in fit(Late(), utilization(adapters={"gate": adapter}))[0]

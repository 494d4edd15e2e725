"""Bounded output of expert utilization for models with several routers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from torch import Tensor, nn

from moe_heads import MoELayer
from moe_heads.analysis.expert_utilization.training import RouterReport
from moe_heads.callbacks import ExpertUtilizationCallback
from moe_heads.callbacks._utilization_log import UtilizationLog
from tests.support.events import read_events, read_layout
from tests.support.lightning_models import NUM_CLASSES, NUM_FEATURES, PlainModule, loader, trainer
from tests.support.utilizations import stats_of

NUM_LAYERS, NUM_EXPERTS = 12, 16


class Layers(PlainModule):
    """A stack of layers; the first two send every row to few experts."""

    def __init__(self, num_layers: int = NUM_LAYERS, num_experts: int = NUM_EXPERTS) -> None:
        super().__init__()
        del self.body, self.head
        options: dict[str, Any] = {"num_experts": num_experts, "expert_width": 2, "normalize": False}
        self.layers = nn.ModuleList(MoELayer(NUM_FEATURES, **options) for _ in range(num_layers))
        self.last = nn.Linear(NUM_FEATURES, NUM_CLASSES)
        for layer in self.layers[:2]:
            layer.router.gate.bias.data[:2] = 100.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.last(x)


def utilization(**options: Any) -> ExpertUtilizationCallback:
    return ExpertUtilizationCallback(**({"warn": False, "on_error": "raise", "num_permutations": 2} | options))


def fit(module: PlainModule, *callbacks: Any, **options: Any) -> Trainer:
    module.test_dataloader = lambda: loader(seed=2)
    run = trainer(*callbacks, **({"max_epochs": 3} | options))
    run.fit(module, loader(), loader(seed=1))
    return run


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.manual_seed(0)
    usage, folder = utilization(), tmp_path_factory.mktemp("runs")
    logger = TensorBoardLogger(folder, default_hp_metric=False)
    run = fit(Layers(), usage, logger=logger)
    logger.experiment.flush()
    folder = Path(logger.log_dir)
    return {"callback": usage, "trainer": run, "events": read_events(folder), "layout": read_layout(folder)}


def test_keys_are_bounded_and_finite(fitted: dict[str, Any]) -> None:
    metrics = {key: value for key, value in fitted["trainer"].callback_metrics.items() if key.startswith("expert_")}
    logged = [tag for tag in fitted["events"].Tags()["scalars"] if tag.startswith("expert_utilization/")]
    assert metrics.keys() == set(logged)
    assert len(logged) <= 60
    assert {key.split("/")[1] for key in logged} == {"epoch", "train", "test"}
    assert not any("layers" in key and "num_layers" not in key for key in logged)
    assert all(math.isfinite(value) for value in metrics.values())


def test_levels_are_those_of_the_results(fitted: dict[str, Any]) -> None:
    heads = fitted["callback"].results["test"].heads
    assert len(heads) == NUM_LAYERS
    metrics = fitted["trainer"].callback_metrics
    assert metrics["expert_utilization/test/load_cv/worst"] == pytest.approx(max(h.load_cv for h in heads.values()))
    assert metrics["expert_utilization/test/num_dead_experts"] == sum(len(h.dead_experts) for h in heads.values())
    last = [epochs[2] for epochs in fitted["callback"].history.values()]
    violations = sorted(float(stats.load.max()) * NUM_EXPERTS - 1 for stats in last)
    middle = (violations[NUM_LAYERS // 2 - 1] + violations[NUM_LAYERS // 2]) / 2
    assert metrics["expert_utilization/epoch/max_violation/median"] == pytest.approx(middle)


def test_figures_are_one_map_an_epoch_and_those_of_the_worst_layers(fitted: dict[str, Any]) -> None:
    events = fitted["events"]
    steps = [image.step for image in events.Images("expert_utilization/epoch/load_by_layer")]
    assert steps == [3, 6, 9]
    tags = [tag for tag in events.Tags()["images"] if tag.startswith("expert_utilization/")]
    worst = {"layers.0", "layers.1"}
    for split in ("train", "test"):
        of_layers = {tag.split("/")[2] for tag in tags if tag.startswith(f"expert_utilization/{split}/layers.")}
        assert of_layers == worst
        assert f"expert_utilization/{split}/load_by_layer" in tags
    assert {tag.split("/")[2] for tag in tags if tag.endswith("load_over_epochs")} == worst
    assert "expert_utilization/epoch/dead_experts_by_layer" in tags
    texts = [tag for tag in events.Tags()["tensors"] if tag.startswith("expert_utilization/train/")]
    assert len(texts) == 3


def test_the_page_of_charts_draws_tags_of_the_run(fitted: dict[str, Any]) -> None:
    (group,) = fitted["layout"].category
    assert group.title == "expert_utilization"
    scalars = fitted["events"].Tags()["scalars"]
    bands = [series for chart in group.chart for series in chart.margin.series]
    assert {tag for s in bands for tag in (s.value, s.lower, s.upper)} <= set(scalars)
    assert len(bands) == 5
    for series in bands:
        ends = [fitted["events"].Scalars(tag) for tag in (series.lower, series.value, series.upper)]
        assert all(low.value <= value.value <= high.value for low, value, high in zip(*ends, strict=True))


def test_wandb_gets_the_same_keys_and_maps(wandb_run: WandbLogger) -> None:
    run = fit(Layers(5, 4), utilization(splits=["train"]), logger=wandb_run, max_epochs=2)
    experiment = wandb_run.experiment
    summary = dict(experiment.summary)
    numbers = {k for k, value in summary.items() if k.startswith("expert_") and isinstance(value, (int, float))}
    assert numbers == {key for key in run.callback_metrics if key.startswith("expert_utilization/")}
    # panels are grouped by the text before the first slash, or before the last one: a measure with its levels
    levels = {key.rsplit("/", 1)[1] for key in numbers if key.startswith("expert_utilization/epoch/load_cv/")}
    assert levels == {"worst", "median", "best"}
    experiment.finish()
    images = Path(experiment.dir) / "media" / "images" / "expert_utilization"
    assert len(list(images.glob("epoch/load_by_layer_*.png"))) == 2
    assert len(list(images.glob("train/load_by_layer_*.png"))) == 1


def test_full_is_all_of_every_layer(tmp_path: Path) -> None:
    logger, usage = TensorBoardLogger(tmp_path, default_hp_metric=False), utilization(detail="full", splits=["train"])
    fit(Layers(3, 4), usage, logger=logger, max_epochs=1)
    logger.experiment.flush()
    tags = read_events(Path(logger.log_dir)).Tags()
    for layer in range(3):
        head = f"layers.{layer}"
        assert {f"expert_utilization/epoch/{head}/{key}" for key in ("importance_3", "relative_load_p10")} <= set(
            tags["scalars"]
        )
        assert f"expert_utilization/train/{head}/mutual_information_stderr" in tags["scalars"]
        assert f"expert_utilization/train/{head}/load" in tags["images"]
        assert f"expert_utilization/epoch/{head}/load_over_epochs" in tags["images"]
    assert "expert_utilization/train/all_heads/relative_load_p90" in tags["scalars"]
    assert not any(tag.endswith(("/worst", "/median", "/best")) for tag in tags["scalars"])
    titles = [chart.title for group in read_layout(Path(logger.log_dir)).category for chart in group.chart]
    assert "layers.2: load of each expert" in titles


def test_two_fits_and_two_callbacks_have_one_page(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    logger.experiment.add_custom_scalars({"mine": {"loss": ["Multiline", ["loss"]]}})
    run = fit(PlainModule(), utilization(stages=["test"]), utilization(name="other", stages=["test"]), logger=logger)
    run.fit_loop.max_epochs = 4
    run.fit(PlainModule(), loader())
    logger.experiment.flush()
    groups = read_layout(Path(logger.log_dir)).category
    assert sorted(group.title for group in groups) == ["expert_utilization", "mine", "other"]


def report(counts: list[int], *warned: str) -> RouterReport:
    stats = stats_of(counts)
    scalars = {"effective_experts": math.exp(float(torch.special.entr(stats.load.double()).sum()))}
    return RouterReport(stats, scalars, False, warned)


def test_warnings_of_many_layers_are_bounded() -> None:
    log = UtilizationLog("expert_utilization", "summary", 0.01, 0.25)
    reports = {f"layers.{layer}": report([layer + 1, 100 - layer], "one expert is rare") for layer in range(14)}
    reports["layers.20"] = report([1, 1])
    log.numbers(reports, {})
    warned = list(log.warnings(reports))
    assert [line.split(":")[0] for line in warned[:4]] == [f"head 'layers.{layer}'" for layer in range(4)]
    assert warned[4].startswith("there are new warnings of other heads (10): 'layers.4', 'layers.5',")
    assert "'layers.11', …. Pass detail='full'" in warned[4]
    full = UtilizationLog("expert_utilization", "full", 0.01, 0.25)
    full.numbers(reports, {})
    assert len(list(full.warnings(reports))) == 14


def test_a_model_with_several_routers_has_a_summary_also_where_one_ran() -> None:
    log = UtilizationLog("expert_utilization", "summary", 0.01, 0.25)
    assert "num_dead_experts" in log.numbers({"a": report([1, 2])}, {"a": {}, "b": {}})
    assert "a/effective_experts" in log.numbers({"a": report([1, 2])}, {"a": {}})


def test_figures_that_fail_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> tuple[Figure, Any]:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("moe_heads.callbacks._utilization_log.plot_load_by_layer", fail)
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    with pytest.warns(UserWarning, match="expert_utilization/epoch: the figures failed with RuntimeError: no fonts"):
        run = fit(Layers(2, 4), utilization(stages=["test"]), logger=logger, max_epochs=1)
    assert run.current_epoch == 1


def test_nothing_is_drawn_where_no_logger_shows_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_heads.callbacks._utilization_log.plot_load_by_layer", None)
    monkeypatch.setattr("moe_heads.callbacks._utilization_log.plot_load_history", None)
    # a failed drawing would cause a warning, which is an error in the tests
    fit(Layers(2, 4), utilization(stages=["test"]), logger=CSVLogger(tmp_path), max_epochs=1)


def test_an_unknown_detail() -> None:
    with pytest.raises(ValueError, match="detail: expected one of 'summary', 'full', got 'all'"):
        ExpertUtilizationCallback(detail="all")

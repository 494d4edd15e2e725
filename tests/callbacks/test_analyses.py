"""The four callbacks together on a plain module and on ours: defaults work, nothing changes, all results are logged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from moe_heads.callbacks import (
    ExpertUtilizationCallback,
    InferenceTimingCallback,
    LossLandscapeCallback,
    SharpnessCallback,
)
from tests.support.events import read_events
from tests.support.lightning_models import PlainModule, assert_same, loader, snapshot, trainer


class Witness(Callback):
    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen = snapshot(pl_module)


def all_four() -> list[Callback]:
    return [
        SharpnessCallback(),
        LossLandscapeCallback(plane_points=3, line_points=5),
        ExpertUtilizationCallback(warn=False),  # what a few samples do to an untrained router is no news
        InferenceTimingCallback(batch_sizes=(1, 8), num_runs=3),
    ]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One fit of a user's module with all four callbacks between two witnesses."""

    class Tested(PlainModule):
        def test_dataloader(self) -> Any:
            return loader(seed=2)

    torch.manual_seed(0)
    before, after, callbacks = Witness(), Witness(), all_four()
    logger = TensorBoardLogger(tmp_path_factory.mktemp("runs"), default_hp_metric=False)
    run = trainer(before, *callbacks, after, logger=logger, max_epochs=2)
    module = Tested()
    run.fit(module, loader(), loader(seed=1))
    logger.experiment.flush()
    by_class = {type(callback).__name__: callback for callback in callbacks}
    return {
        "trainer": run,
        "module": module,
        "before": before.seen,
        "after": after.seen,
        "callbacks": by_class,
        "events": read_events(Path(logger.log_dir)),
    }


def test_nothing_is_lost(fitted: dict[str, Any]) -> None:
    assert_same(fitted["before"], fitted["after"])


def test_every_analysis_has_results(fitted: dict[str, Any]) -> None:
    splits = {name: set(callback.results) for name, callback in fitted["callbacks"].items()}
    assert splits == {
        "SharpnessCallback": {"train", "test"},
        "LossLandscapeCallback": {"train", "test"},
        "ExpertUtilizationCallback": {"train", "test"},
        "InferenceTimingCallback": {"test"},
    }


def test_sharpness_is_that_of_the_modules_own_loss(fitted: dict[str, Any]) -> None:
    module = fitted["module"].eval()
    x, y = (torch.cat(parts) for parts in zip(*loader(), strict=True))
    parameters = list(module.parameters())
    loss = torch.nn.functional.cross_entropy(module(x), y)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    flat = torch.cat([g.flatten() for g in gradients])
    options: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
    rows = [torch.cat([h.flatten() for h in torch.autograd.grad(entry, parameters, **options)]) for entry in flat]
    eigenvalues = torch.linalg.eigvalsh(torch.stack(rows))
    result = fitted["callbacks"]["SharpnessCallback"].results["train"]
    metric = fitted["trainer"].callback_metrics["sharpness/train/lambda_max"]
    assert metric == pytest.approx(result.eigenvalues[0])
    assert result.eigenvalues[0] == pytest.approx(eigenvalues[-1].item(), rel=1e-3)
    assert result.eigenvalues[1] == pytest.approx(eigenvalues[-2].item(), rel=1e-3)


def test_landscape_takes_the_eigenvector_of_the_sharpness_run(
    fitted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = fitted["callbacks"]["LossLandscapeCallback"].results
    assert results["train"].plane is not None
    assert results["test"].plane is None
    line = results["train"].line
    module = fitted["module"].eval()
    x, y = (torch.cat(parts) for parts in zip(*loader(), strict=True))
    assert line.center_loss == pytest.approx(torch.nn.functional.cross_entropy(module(x), y).item(), rel=1e-5)
    monkeypatch.setattr("moe_heads.callbacks._landscape_eigenvectors.top_eigenvectors", None)
    alone = LossLandscapeCallback(plane_splits=[], line_points=3, splits=["train"], on_error="raise")
    trainer(SharpnessCallback(splits=["train"]), alone).fit(PlainModule(), loader())
    # one that stands after the landscape has nothing to give, not even from an earlier fit
    late = SharpnessCallback(splits=["train"])
    trainer(late).fit(PlainModule(), loader())
    with pytest.raises(TypeError, match="NoneType"):
        trainer(alone, late).fit(PlainModule(), loader())
    with pytest.raises(TypeError, match="NoneType"):
        trainer(alone).fit(PlainModule(), loader())


def test_utilization_has_a_point_an_epoch_that_counts_every_row(fitted: dict[str, Any]) -> None:
    callback = fitted["callbacks"]["ExpertUtilizationCallback"]
    assert [stats.num_rows.item() for stats in callback.history["head"].values()] == [40, 40]
    assert [stats.counts.sum().item() for stats in callback.history["head"].values()] == [80, 80]
    points = fitted["events"].Scalars("expert_utilization/epoch/head/load_0")
    loads = [stats.load[0].item() for stats in callback.history["head"].values()]
    assert [point.value for point in points] == pytest.approx(loads)


def test_timing_has_the_head_by_itself(fitted: dict[str, Any]) -> None:
    rows = fitted["callbacks"]["InferenceTimingCallback"].results["test"].rows
    modules = {row.module for row in rows}
    assert {"model", "head", "head.router", "head_dense"} <= modules
    assert {(row.module, row.batch_size) for row in rows} >= {("model", 1), ("model", 8), ("head", 1), ("head", 8)}


def test_timing_is_written_as_json_next_to_the_events(fitted: dict[str, Any]) -> None:
    timing = fitted["callbacks"]["InferenceTimingCallback"].results["test"]
    path = Path(fitted["trainer"].logger.log_dir, "inference_timing", "test", "timing.json")
    assert [row["p50_ms"] for row in json.loads(path.read_text())["rows"]] == [row.p50_ms for row in timing.rows]


def test_everything_is_in_tensorboard(fitted: dict[str, Any]) -> None:
    tags = fitted["events"].Tags()
    assert {
        "sharpness/train/spectrum",
        "sharpness/test/spectrum",
        "loss_landscape/train/line",
        "loss_landscape/train/plane",
        "expert_utilization/test/head/load",
        "expert_utilization/test/head/classes",
        "expert_utilization/epoch/head/load_over_epochs",
        *(f"inference_timing/test/{figure}" for figure in ("latency", "throughput", "gap", "split")),
    } <= set(tags["images"])
    assert {
        "sharpness/train/lambda_max",
        "sharpness/test/trace_stderr",
        "inference_timing/test/head/batch8/p50_ms",
        "inference_timing/test/head/batch8/speedup",
    } <= set(tags["scalars"])
    texts = ("sharpness/train", "loss_landscape/test", "expert_utilization/train", "inference_timing/test")
    assert {f"{name}/summary/text_summary" for name in texts} <= set(tags["tensors"])
    assert "loss_landscape/train/surface_VERTEX" in tags["tensors"]
    assert "_hparams_/session_start_info" in fitted["events"].PluginTagToContent("hparams")


def test_a_model_without_router_or_backbone_is_fine() -> None:
    class Linear(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

        def training_step(self, batch: Any) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callbacks = [
        SharpnessCallback(splits=["train"], on_error="raise"),
        LossLandscapeCallback(splits=["train"], plane_points=3, line_points=3, on_error="raise"),
        ExpertUtilizationCallback(splits=["train"], on_error="raise"),
        InferenceTimingCallback(splits=["train"], batch_sizes=(2,), num_runs=2, on_error="raise"),
    ]
    trainer(*callbacks).fit(Linear(), loader())
    assert callbacks[2].results["train"].load == {}
    assert {row.module for row in callbacks[3].results["train"].rows} == {"model"}


def test_hooks_are_gone_when_the_module_ends_its_epoch_early() -> None:
    class Impatient(PlainModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 1 else None

    module = Impatient()
    callback = ExpertUtilizationCallback(splits=["train"])
    trainer(callback).fit(module, loader())
    assert all(not child._forward_hooks for child in module.modules())
    assert callback.history["head"][0].num_rows == 16


def test_a_module_without_forward_raises_an_error_before_training() -> None:
    class Silent(PlainModule):
        forward = LightningModule.forward

    for callback in (InferenceTimingCallback(), ExpertUtilizationCallback()):
        with pytest.raises(MisconfigurationException, match=r"expected a module with a forward method, got Silent"):
            trainer(callback).fit(Silent(), loader())


def test_timing_runs_in_the_precision_of_the_trainer() -> None:
    timing = InferenceTimingCallback(splits=["train"], batch_sizes=[2], num_runs=2, on_error="raise")
    trainer(timing, precision="bf16-mixed").fit(PlainModule(), loader())
    assert timing.results["train"].environment.autocast == "bfloat16"


def test_hooks_are_gone_after_an_error_in_training() -> None:
    class Breaking(PlainModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            raise RuntimeError("stop")

    module = Breaking()
    with pytest.raises(RuntimeError, match="stop"):
        trainer(ExpertUtilizationCallback()).fit(module, loader())
    assert all(not child._forward_hooks for child in module.modules())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SharpnessCallback(num_eigenvalues=0), "num_eigenvalues: expected"),
        (lambda: SharpnessCallback(tolerance=0.0), "tolerance: expected"),
        (lambda: SharpnessCallback(max_probes=1), "max_probes: expected"),
        (lambda: LossLandscapeCallback(line_points=2), "line_points: expected an integer of at least 3, got 2"),
        (lambda: LossLandscapeCallback(plane_points=2), "plane_points: expected an integer of at least 3, got 2"),
        (
            lambda: LossLandscapeCallback(plane_splits=["dev"]),
            r"plane_splits: expected some of splits = .* got \['dev'",
        ),
        (lambda: LossLandscapeCallback(line_reach=0.0), "line_reach: expected a finite number above 0, got 0.0"),
        (lambda: InferenceTimingCallback(batch_sizes=()), "batch_sizes: expected"),
        (lambda: InferenceTimingCallback(num_runs=0), "num_runs: expected"),
        (lambda: InferenceTimingCallback(modes=["fast"]), "modes: expected a list of"),
        (lambda: InferenceTimingCallback(max_seconds=0), "max_seconds: expected a finite number above 0, got 0"),
        (lambda: InferenceTimingCallback(forward_fn=3), "forward_fn: expected a function or None, got 3"),
        (lambda: InferenceTimingCallback(modules=3), "modules: expected a list of names, got 3"),
        (lambda: InferenceTimingCallback(modules="head"), "modules: expected a list of names, got 'head'"),
    ],
)
def test_bad_options_raise_an_error_before_training(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


class Building(PlainModule):
    """Builds its layer in setup(), and counts its training steps."""

    num_steps = 0

    def setup(self, stage: str) -> None:
        self.head = torch.nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.num_steps += 1
        return torch.nn.functional.cross_entropy(self.head(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda name: SharpnessCallback(params=[name], splits=["train"]),
            "params: expected names of parameters or modules, such as",
        ),
        (
            lambda name: SharpnessCallback(blocks={"a": [name]}, splits=["train"]),
            r"blocks\['a'\]: expected names of parameters or",
        ),
        (
            lambda name: LossLandscapeCallback(params=[name], plane_points=3, line_points=3, splits=["train"]),
            "params: expected names of",
        ),
        (
            lambda name: InferenceTimingCallback(modules=[name], num_runs=3, splits=["train"]),
            "modules: expected names of modules, such",
        ),
    ],
    ids=["sharpness", "blocks", "loss_landscape", "inference_timing"],
)
def test_names_are_checked_before_training_when_all_layers_are_built(build: Any, message: str) -> None:
    module = Building()
    with pytest.raises(ValueError, match=message):
        trainer(build("heads")).fit(module, loader())
    assert module.num_steps == 0
    callback = build("head")
    trainer(callback).fit(module, loader())
    assert callback.results


def test_an_unknown_option_names_the_callback_and_a_similar_option() -> None:
    build: Any = SharpnessCallback
    with pytest.raises(TypeError, match=r"SharpnessCallback: got an unexpected option 'num_eigenvalue'. Did you mean"):
        build(num_eigenvalue=3)
    build = ExpertUtilizationCallback
    with pytest.raises(TypeError, match=r"ExpertUtilizationCallback: got an unexpected option 'x'. The options are "):
        build(x=3)

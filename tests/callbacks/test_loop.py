"""Analyses in a plain PyTorch loop and in one of Fabric: the numbers are those under a Trainer."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from moe_heads.callbacks import (
    ExpertUtilizationCallback,
    LossLandscapeCallback,
    SharpnessCallback,
    TrainingMonitor,
)
from tests.support.analyses import Failing, MeanLoss, Weight
from tests.support.events import read_events
from tests.support.lightning_models import PlainModule, loader, trainer

Model = PlainModule | nn.Module


class WithTestData(PlainModule):
    def test_dataloader(self) -> DataLoader[Any]:
        return loader(seed=1)


def model() -> PlainModule:
    torch.manual_seed(0)
    return WithTestData()


def loss_of(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def analyses() -> list[Any]:
    fast: dict[str, Any] = {"num_eigenvalues": 1, "trace_tolerance": 0.9, "density": False, "routing_steps": ()}
    return [
        SharpnessCallback(every_n_train_steps=4, num_samples=30, on_error="raise", **fast),
        ExpertUtilizationCallback(every_n_train_steps=2, num_permutations=0, splits=["train"], on_error="raise"),
        LossLandscapeCallback(every_n_epochs=2, line_points=3, plane_splits=[], splits=["train"], on_error="raise"),
    ]


def train(monitor: TrainingMonitor | None, own: Any, optimizer: Any, num_epochs: int = 1, data: Any = None) -> None:
    own.train()
    for _ in range(num_epochs):
        for batch in data or loader():
            optimizer.zero_grad()
            loss_of(own, batch).backward()
            optimizer.step()
            if monitor is not None:
                monitor.step(own, batch)
        if monitor is not None:
            monitor.end_epoch(own)


def scalars(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    events = read_events(Path(folder))
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_same_series(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for tag, points in wanted.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in points], tag
        for (_, one), (_, other) in zip(found[tag], points, strict=True):
            is_time = tag.startswith(("sharpness/step/seconds", "sharpness/step/overhead"))
            assert is_time or one == other or (math.isnan(one) and math.isnan(other)), tag


@pytest.fixture(scope="module")
def under_a_trainer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logger = TensorBoardLogger(tmp_path_factory.mktemp("trainer"), default_hp_metric=False)
    trainer(*analyses(), logger=logger, max_epochs=2).fit(model(), loader())
    return Path(logger.log_dir)


def test_the_series_are_those_under_a_trainer(under_a_trainer: Path, tmp_path: Path) -> None:
    own, writer = model(), SummaryWriter(tmp_path)
    optimizer = own.configure_optimizers()
    monitor = TrainingMonitor(analyses(), loss_fn=loss_of, writer=writer)
    monitor.start(own, optimizer, train=loader(), test=loader(seed=1))
    train(monitor, own, optimizer, num_epochs=2)
    results = monitor.end(own)
    writer.close()
    wanted = scalars(under_a_trainer)
    assert {tag: wanted.pop(tag) for tag in ("epoch", "loss")}  # Lightning's own
    assert_same_series(scalars(tmp_path), wanted)
    for kind in ("images", "tensors"):
        assert set(read_events(tmp_path).Tags()[kind]) == set(read_events(under_a_trainer).Tags()[kind]) != set()
    assert {name: list(found) for name, found in results.items()} == {
        "sharpness": ["train", "test"],
        "expert_utilization": ["train"],
        "loss_landscape": ["train"],
    }
    assert monitor.metrics["sharpness/test/lambda_max"] == results["sharpness"]["test"].metrics()["lambda_max"]
    assert results["sharpness"]["train"].stability_threshold == pytest.approx(2 * 1.9 / 0.05)


def test_fabric_has_the_same_series(under_a_trainer: Path, tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, loggers=TensorBoardLogger(tmp_path, name="", version=""))
    own = model()
    wrapped, optimizer = fabric.setup(own, own.configure_optimizers())
    data = fabric.setup_dataloaders(loader())
    assert isinstance(data, DataLoader) is False  # wrapped as well
    monitor = TrainingMonitor(analyses(), loss_fn=loss_of, writer=fabric.logger)
    monitor.start(wrapped, optimizer, train=data, test=loader(seed=1))
    wrapped.train()
    for _ in range(2):
        for batch in data:
            optimizer.zero_grad()
            fabric.backward(loss_of(wrapped, batch))
            optimizer.step()
            monitor.step(wrapped, batch)
        monitor.end_epoch(wrapped)
    monitor.end(wrapped)
    wanted = scalars(under_a_trainer)
    del wanted["epoch"], wanted["loss"]
    assert_same_series(scalars(tmp_path), wanted)


def test_the_training_is_bit_for_bit_that_without_a_monitor() -> None:
    finals = []
    for monitor in (None, TrainingMonitor(analyses(), loss_fn=loss_of)):
        own = model()
        optimizer = own.configure_optimizers()
        if monitor is not None:
            monitor.start(own, optimizer, train=loader(), test=loader(seed=1))
        train(monitor, own, optimizer, num_epochs=2)
        hooks = sum(len(module._forward_hooks) for module in own.modules())
        assert (hooks > 0) == (monitor is not None)
        if monitor is not None:
            monitor.end(own)
            assert sum(len(module._forward_hooks) for module in own.modules()) == 0
            assert not optimizer._optimizer_step_pre_hooks
        states = [value["momentum_buffer"] for value in optimizer.state_dict()["state"].values()]
        finals.append([*own.state_dict().values(), *states, torch.get_rng_state()])
    for one, other in zip(*finals, strict=True):
        assert torch.equal(one, other)


def test_only_a_batch_with_an_optimizer_step_is_a_step() -> None:
    own = model()
    optimizer, tracked = own.configure_optimizers(), Weight(splits=["train"], every_n_train_steps=2)
    utilization = ExpertUtilizationCallback(splits=["train"])
    monitor = TrainingMonitor([tracked, utilization])
    monitor.start(own, optimizer, train=loader())
    for place, batch in enumerate([*loader(), *loader()]):  # of 16, 16 and 8 samples
        loss_of(own, batch).backward()
        if place % 2:
            optimizer.step()
            optimizer.zero_grad()
        monitor.step(own, batch)
    assert monitor.num_steps == 3
    assert [*tracked.tracked_steps["train"]] == [2]
    monitor.end(own)
    assert int(utilization.history["head"][0].num_rows) == 2 * 40


def test_without_data_an_analysis_uses_the_batch_of_the_step() -> None:
    own, mean = model(), MeanLoss(splits=["train"], every_n_train_steps=1)
    monitor = TrainingMonitor([mean], loss_fn=loss_of)
    losses = []
    monitor.start(own)
    for batch in loader():
        monitor.step(own, batch)
        own.eval()
        losses.append(loss_of(own, batch).item())
    assert [point["value"] for point in mean.tracked_steps["train"].values()] == pytest.approx(losses)
    assert monitor.num_steps == 3
    assert monitor.end(own, train=loader())["mean_loss"]["train"] != losses[-1]


def test_passes_in_evaluation_mode_do_not_count_as_training() -> None:
    own = model()
    utilization = ExpertUtilizationCallback(splits=["train"], every_n_train_steps=1)
    monitor = TrainingMonitor([utilization])
    monitor.start(own)
    for batch in loader():
        own.train()
        own(batch[0])
        own.eval()
        own(torch.randn(1000, 5))  # a validation
        monitor.step(own, batch)
        own(torch.randn(1000, 5))
    assert [int(stats.num_rows) for stats in utilization.history_steps["head"].values()] == [16, 16, 8]
    monitor.close()


def test_passes_without_gradients_do_not_count_as_training() -> None:
    own = model().train()
    utilization = ExpertUtilizationCallback(splits=["train"], every_n_train_steps=1)
    monitor = TrainingMonitor([utilization])
    monitor.start(own)
    for batch in loader():
        own(batch[0])
        monitor.step(own, batch)
        with torch.no_grad():
            own(torch.randn(1000, 5))
    assert [int(stats.num_rows) for stats in utilization.history_steps["head"].values()] == [16, 16, 8]
    monitor.close()


def test_the_first_batch_is_missed_with_a_warning_if_nothing_was_started() -> None:
    own = model()
    monitor = TrainingMonitor([ExpertUtilizationCallback(splits=["train"])])
    with pytest.warns(UserWarning, match="TrainingMonitor: the expert utilization lacks the batches before the first"):
        monitor.step(own, next(iter(loader())))
    monitor.close()


def test_nothing_after_the_end_forgets_the_results() -> None:
    own, weight = model(), Weight(splits=["train"], every_n_train_steps=1)
    monitor = TrainingMonitor([weight])
    monitor.start(own, train=loader())
    monitor.step(own, next(iter(loader())))
    results = monitor.end(own)
    for call in (lambda: monitor.step(own), lambda: monitor.end(own), lambda: monitor.end_epoch(own)):
        with pytest.raises(ValueError, match="expected a training that runs, got one that has ended"):
            call()
    assert results["weight"] == weight.results != {} and [*weight.tracked_steps["train"]] == [1]
    monitor.start(own)
    monitor.close()


def test_a_training_that_is_not_started_begins_with_its_first_step() -> None:
    own, weight = model(), Weight(splits=["train"], every_n_train_steps=2)
    monitor = TrainingMonitor([weight])
    for batch in loader():
        monitor.step(own, batch)
    assert [*weight.tracked_steps["train"]] == [2]


def test_a_resumed_training_continues_its_series() -> None:
    def monitor() -> tuple[ExpertUtilizationCallback, TrainingMonitor]:
        utilization = ExpertUtilizationCallback(splits=["train"], every_n_train_steps=2)
        return utilization, TrainingMonitor([utilization])

    def run(own: Model, utilization: Any, observer: TrainingMonitor, num_epochs: int) -> None:
        for _ in range(num_epochs):
            for batch in loader():
                own(batch[0])
                observer.step(own, batch)
            observer.end_epoch(own)

    own = model()
    whole, first = monitor(), monitor()
    whole[1].start(own)
    run(own, *whole, num_epochs=3)
    whole[1].close()
    first[1].start(own)
    run(own, *first, num_epochs=1)
    state = first[1].state_dict()
    first[1].close()
    second = monitor()
    second[1].load_state_dict(state)
    second[1].start(own)
    assert second[1].num_steps == 3
    run(own, *second, num_epochs=2)
    assert [*second[0].history["head"]] == [*whole[0].history["head"]] == [0, 1, 2]
    assert [*second[0].history_steps["head"]] == [*whole[0].history_steps["head"]]
    second[1].start(own)  # another training
    assert second[0].history == {} and second[1].num_steps == 0
    second[1].close()


def test_a_compiled_model_is_analyzed_as_it_was_written() -> None:
    own = model()
    compiled = torch.compile(own, backend="eager")
    monitor = TrainingMonitor([Weight(splits=["train"])])
    monitor.start(compiled)
    compiled(torch.randn(4, 5))
    monitor.step(compiled, next(iter(loader())))
    assert monitor.end(own, train=loader())["weight"]["train"] == own.body[0].weight[0, 0].item()


def test_a_failed_analysis_ends_neither_the_training_nor_the_others() -> None:
    own = model()
    monitor = TrainingMonitor(
        [Failing(RuntimeError("broken"), splits=["train"]), MeanLoss(splits=["train"])], loss_fn=loss_of
    )
    monitor.start(own)
    with pytest.warns(UserWarning, match="failing/train: failed with RuntimeError: broken"):
        results = monitor.end(own, train=loader())
    assert results["failing"] == {} and results["mean_loss"].keys() == {"train"}
    assert all(parameter.requires_grad for parameter in own.parameters())


def test_the_hooks_are_gone_after_an_error_of_the_loop() -> None:
    own = model()
    optimizer = own.configure_optimizers()
    monitor = TrainingMonitor([ExpertUtilizationCallback(mask_fn=lambda batch: torch.ones(3, 3))])
    monitor.start(own, optimizer)
    monitor.close()
    assert not any(module._forward_hooks for module in own.modules())
    assert not optimizer._optimizer_step_post_hooks


def test_writers(tmp_path: Path, wandb_run: WandbLogger) -> None:
    own = model()
    plain = CSVLogger(tmp_path / "csv")
    monitor = TrainingMonitor([Weight(splits=["train"])], writer=[plain, wandb_run.experiment])
    monitor.start(own)
    monitor.end(own, train=loader())
    plain.save()
    assert "weight/train/value" in (Path(plain.log_dir) / "metrics.csv").read_text()
    assert wandb_run.experiment.summary["weight/train/value"] == pytest.approx(own.body[0].weight[0, 0].item())


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: TrainingMonitor([]), ValueError, "analyses: expected callbacks such as SharpnessCallback"),
    (lambda: TrainingMonitor([nn.Linear(1, 1)]), ValueError, "analyses: expected callbacks .*, got Linear"),
    (lambda: TrainingMonitor([Weight(), Weight()]), ValueError, "two with the name 'weight'.*name='weight_2'"),
    (lambda: TrainingMonitor([Weight(weights="best")]), ValueError, r"Weight\(weights='best'\): expected weights"),
    (lambda: TrainingMonitor([Weight()], writer="runs"), ValueError, "writer: expected a torch.utils.*, got str"),
    (lambda: TrainingMonitor([Weight()], loss_fn=1), ValueError, r"loss_fn: expected loss_fn\(model, batch\)"),
    (lambda: TrainingMonitor([MeanLoss()]).start(nn.Linear(1, 1)), MisconfigurationException, "Pass loss_fn="),
    (
        lambda: TrainingMonitor([Weight()]).start(nn.Linear(1, 1), train=(torch.ones(2, 1), torch.ones(2))),
        ValueError,
        r"train: expected a loader or a list of batches, got a tuple of tensors.*train=\[batch\]",
    ),
    (lambda: TrainingMonitor([Weight()]).start(nn.Linear(1, 1), "sgd"), ValueError, "optimizer: expected a torch"),
    (
        lambda: TrainingMonitor([SharpnessCallback(params=["neck"])], loss_fn=loss_of).start(model()),
        ValueError,
        "params: .*'neck'",
    ),
]


@pytest.mark.parametrize(("build", "kind", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_use_raises_an_error(build: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build()


def test_a_sharded_model_raises_an_error_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_heads.callbacks.loop.is_sharded", lambda model: True)
    monitor = TrainingMonitor([Weight()])
    with pytest.raises(MisconfigurationException, match="expected a model that is whole in every process"):
        monitor.start(model())


def test_another_model_raises_an_error() -> None:
    monitor = TrainingMonitor([Weight()])
    monitor.start(model())
    with pytest.raises(ValueError, match="model: expected the model that the training was started with"):
        monitor.step(model(), None)
    monitor.close()


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    yield
    torch._dynamo.reset()

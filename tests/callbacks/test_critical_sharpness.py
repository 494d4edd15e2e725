"""Critical sharpness of the steps of a training: its value, and a training that does not notice it."""

import math
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.callbacks import (
    CriticalSharpnessCallback,
    ExpertUtilizationCallback,
    SharpnessCallback,
    TrainingMonitor,
)
from tests.support.events import read_events
from tests.support.lightning_models import PlainModule, assert_same, loader, snapshot, trainer

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


class Module(PlainModule):
    def __init__(self, optimizer: str = "momentum") -> None:
        torch.manual_seed(0)
        super().__init__()
        self.kind = optimizer

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.kind](self.parameters())


def fitted(*callbacks: Any, kind: str = "momentum", **options: Any) -> tuple[Trainer, Module]:
    own = Module(kind)
    run = trainer(*callbacks, **({"max_epochs": 3} | options))
    torch.manual_seed(1)
    run.fit(own, loader(shuffle=True))
    return run, own


def optimizer_state(run: Trainer) -> dict[Any, Any]:
    state = run.optimizers[0].state_dict()["state"]
    return {f"{p}/{key}": value for p, found in state.items() for key, value in found.items()}


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.01}],
    ids=["plain", "accumulation", "autocast", "clipping"],
)
@pytest.mark.parametrize("kind", ["momentum", "AdamW"])
def test_the_training_is_bit_for_bit_that_without_it(kind: str, options: dict[str, Any]) -> None:
    plain, bare = fitted(kind=kind, **options)
    callback = CriticalSharpnessCallback(every_n_train_steps=2, on_error="raise")
    run, own = fitted(callback, kind=kind, **options)
    assert len(callback.tracked_steps["train"]) == run.global_step // 2 > 0
    assert_same(snapshot(bare), snapshot(own))
    assert_same(optimizer_state(plain), optimizer_state(run))
    assert float(run.callback_metrics["loss"]) == float(plain.callback_metrics["loss"])


def test_the_utilization_counts_no_pass_of_it() -> None:
    def counted(*others: Any) -> Any:
        utilization = ExpertUtilizationCallback(num_permutations=0, splits=["train"], on_error="raise")
        fitted(*others, utilization, max_epochs=1)
        return utilization.history["head"][0].num_rows

    assert int(counted()) == int(counted(CriticalSharpnessCallback(every_n_train_steps=1, on_error="raise")))


# Outside of the module, whose attributes the callback puts back.
MASKS: list[Tensor] = []


class Regression(LightningModule):
    """A linear regression, whose loss is a quadratic function, with dropout that makes it another one each step."""

    def __init__(self, optimizer: str, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 1, dtype=torch.float64)
        self.dropout = nn.Dropout(dropout)
        self.kind = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.dropout(batch[0].double())
        MASKS.append((x != 0).detach())
        return F.mse_loss(self.layer(x)[:, 0], batch[1].double())

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.kind](self.parameters())


class Exact(CriticalSharpnessCallback):
    """Computes the closed form from the parameters around each step, for a dropout of zero."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.exact: dict[int, float] = {}

    def before_step(self, context: Any, optimizer: Any) -> None:
        super().before_step(context, optimizer)
        self.held = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        self.gradient = torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]])

    def end_batch(self, context: Any, model: Any, batch: Any) -> None:
        step = torch.cat([(p - old).flatten() for p, old in zip(model.parameters(), self.held, strict=True)]).detach()
        x = torch.cat([batch[0].double(), torch.ones(len(batch[0]), 1, dtype=torch.float64)], 1)
        curvature = 2 * (x @ step).square().mean()
        self.exact[context.step] = (
            float(curvature / -(self.gradient @ step)) / context.optimizers[0].param_groups[0]["lr"]
        )
        super().end_batch(context, model, batch)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_equals_the_closed_form_on_the_batch_of_the_step(kind: str) -> None:
    callback = Exact(every_n_train_steps=1, on_error="raise")
    trainer(callback, max_epochs=4).fit(Regression(kind), loader(batch_size=8, shuffle=True))
    points = callback.tracked_steps["train"]
    assert list(points) == list(range(1, 21))
    known = {step: point for step, point in points.items() if "lambda_c" in point}
    unknown = set(points) - set(known)
    assert all(callback.exact[step] < 0 or callback.exact[step] > 1e4 for step in unknown)
    assert len(known) >= 10 and sum(callback.num_unknown.values()) == len(unknown)
    for step, point in known.items():
        assert abs(point["lambda_c"] / callback.exact[step] - 1) <= min(point["relative_error"], 0.03) + 1e-9
        assert point["num_passes"] <= 9


class Indexed(Regression):
    """A loss that depends on the index of the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = (1 + batch_idx) * super().training_step(batch, batch_idx)
        self.log("seen", loss)
        return loss


def test_the_loss_is_that_of_the_index_of_the_batch() -> None:
    class Seen(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    losses: list[float] = []
    callback = CriticalSharpnessCallback(every_n_train_steps=1, on_error="raise")
    trainer(callback, Seen(), max_epochs=2).fit(Indexed("SGD"), loader(batch_size=8))
    found = [point["loss"] for point in callback.tracked_steps["train"].values()]
    assert len(found) > 5 and found == pytest.approx(losses)


def test_the_random_numbers_are_those_of_the_step() -> None:
    own = Regression("SGD", dropout=0.5)
    MASKS.clear()
    trainer(CriticalSharpnessCallback(every_n_train_steps=2, on_error="raise"), max_epochs=1).fit(own, loader())
    first, second, *evaluated = MASKS
    assert len(evaluated) > 4
    assert all(torch.equal(mask, second) for mask in evaluated[:-1]) and not torch.equal(first, second)


def test_a_part_of_the_batch() -> None:
    callback = CriticalSharpnessCallback(every_n_train_steps=1, fraction=0.25, on_error="raise")
    own = Regression("SGD")
    MASKS.clear()
    trainer(callback, limit_train_batches=1).fit(own, loader())
    assert [len(mask) for mask in MASKS][:3] == [16, 4, 4]
    assert callback.results["train"].num_samples == 4


def test_accumulated_batches_are_evaluated_together() -> None:
    one, parts = (CriticalSharpnessCallback(every_n_train_steps=1, on_error="raise") for _ in range(2))
    trainer(one, limit_train_batches=1).fit(Regression("SGD"), loader(batch_size=16))
    trainer(parts, limit_train_batches=2, accumulate_grad_batches=2).fit(Regression("SGD"), loader(batch_size=8))
    assert parts.results["train"].lambda_c == pytest.approx(one.results["train"].lambda_c, rel=1e-6)
    assert parts.results["train"].num_samples == one.results["train"].num_samples == 16


def test_the_same_points_in_a_plain_loop() -> None:
    under = CriticalSharpnessCallback(every_n_train_steps=2, on_error="raise")
    trainer(under, max_epochs=2).fit(Regression("momentum"), loader())
    own, plain = Regression("momentum"), CriticalSharpnessCallback(every_n_train_steps=2, on_error="raise")
    optimizer: Any = own.configure_optimizers()

    def loss_fn(model: Any, batch: Any) -> Tensor:
        return F.mse_loss(model.layer(batch[0].double())[:, 0], batch[1].double())

    monitor = TrainingMonitor([plain], loss_fn=loss_fn)
    monitor.start(own, optimizer)
    for _ in range(2):
        for batch in loader():
            optimizer.zero_grad()
            loss_fn(own, batch).backward()
            optimizer.step()
            monitor.step(own, batch)
        monitor.end_epoch(own)
    monitor.end(own)
    assert plain.tracked_steps == under.tracked_steps
    assert monitor.metrics["critical_sharpness/step/loss"] == plain.tracked_steps["train"][6]["loss"]
    assert "points, one every 2 steps" in plain.summary()


def test_logged_with_a_figure_that_shows_the_eigenvalues(tmp_path: Any) -> None:
    sharpness = SharpnessCallback(
        every_n_train_steps=3,
        splits=["train"],
        num_samples=20,
        num_eigenvalues=1,
        trace_tolerance=0.9,
        density=False,
        routing_steps=(),
    )
    loggers = [TensorBoardLogger(tmp_path, default_hp_metric=False), CSVLogger(tmp_path)]
    fitted(sharpness, CriticalSharpnessCallback(every_n_train_steps=2), logger=loggers, max_epochs=1)
    events = read_events(loggers[0].log_dir)
    assert {"critical_sharpness/step/critical_step", "critical_sharpness/step/loss"} <= set(events.Tags()["scalars"])
    assert "critical_sharpness/step/tracking" in events.Tags()["images"]


class Two(PlainModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parts = (self.body.parameters(), self.head.parameters())
        return [torch.optim.SGD(part, lr=0.05) for part in parts], []


def loss_of_two(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_two_optimizers_need_a_choice() -> None:
    with pytest.raises(MisconfigurationException, match=r"got 2\. Choose one of them with optimizer=0 to optimizer=1"):
        trainer(CriticalSharpnessCallback(loss_fn=loss_of_two)).fit(Two(), loader())
    with pytest.raises(MisconfigurationException, match="expected optimizer=0 to 1, got 2"):
        trainer(CriticalSharpnessCallback(loss_fn=loss_of_two, optimizer=2)).fit(Two(), loader())
    callback = CriticalSharpnessCallback(2, loss_fn=loss_of_two, optimizer=1, on_error="raise")
    trainer(callback).fit(Two(), loader())
    assert list(callback.tracked_steps["train"]) == [2, 4, 6]  # each batch takes two steps


def test_lbfgs_is_an_error_before_training() -> None:
    class Second(PlainModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("the training has begun")

    with pytest.raises(MisconfigurationException, match="an update direction, got LBFGS"):
        trainer(CriticalSharpnessCallback()).fit(Second(), loader())
    own = nn.Linear(2, 1)
    monitor = TrainingMonitor([CriticalSharpnessCallback()], loss_fn=loss_of_two)
    with pytest.raises(MisconfigurationException, match="an update direction, got LBFGS"):
        monitor.start(own, torch.optim.LBFGS(own.parameters()))
    with pytest.raises(MisconfigurationException, match="expected a training with a known optimizer"):
        monitor.start(own)


def test_a_failed_point_does_not_end_the_training() -> None:
    def failing(model: Any, batch: Any) -> Tensor:
        raise RuntimeError("no loss today")

    with pytest.warns(UserWarning, match="no loss today"):
        _, own = fitted(CriticalSharpnessCallback(2, loss_fn=failing))
    _, bare = fitted()
    assert_same(snapshot(bare), snapshot(own))
    with pytest.raises(RuntimeError, match="no loss today"):
        fitted(CriticalSharpnessCallback(2, loss_fn=failing, on_error="raise"))


def test_several_learning_rates_leave_out_what_has_no_unit() -> None:
    class Groups(Regression):
        def configure_optimizers(self) -> Any:
            groups = [{"params": [self.layer.weight], "lr": 0.1}, {"params": [self.layer.bias], "lr": 0.01}]
            return torch.optim.SGD(groups)

    callback = CriticalSharpnessCallback(1, on_error="raise")
    trainer(callback).fit(Groups("SGD"), loader())
    point = callback.tracked_steps["train"][1]
    assert "critical_step" in point and not {"lambda_c", "threshold"} & set(point)


def test_wrong_options() -> None:
    for options, message in (
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.5}, "at most 1, got 1.5"),
        ({"every_n_train_steps": 0}, "every_n_train_steps"),
        ({"optimizer": -1}, "optimizer"),
        ({"max_passes": 1}, "max_passes"),
    ):
        with pytest.raises(ValueError, match=message):
            CriticalSharpnessCallback(**options)
    with pytest.raises(MisconfigurationException, match=r"got a call of analyze\(\)"):
        CriticalSharpnessCallback(loss_fn=loss_of_two).analyze(PlainModule(), train=list(loader()))


def test_unknown_values_are_not_logged_as_numbers() -> None:
    callback = CriticalSharpnessCallback(1, smallest_step=0.9, largest_step=1.1, on_error="raise")
    trainer(callback).fit(Regression("SGD"), loader())
    assert sum(callback.num_unknown.values()) == 3
    assert all(math.isfinite(value) for point in callback.tracked_steps["train"].values() for value in point.values())
    assert "unknown at" in callback.summary()

"""Analysis of one split: plain calls and cached results."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moe_heads import SparseMoE
from moe_heads.analysis import sharpness
from moe_heads.callbacks import (
    AnalysisInputs,
    ExpertUtilizationCallback,
    FitEndAnalysis,
    InferenceTimingCallback,
    LossLandscapeCallback,
    Report,
    SharpnessCallback,
)
from tests.support.hessians import cross_entropy
from tests.support.lightning_models import NUM_FEATURES, PlainModule, assert_same, loader, snapshot, trainer
from tests.support.untouched import untouched


def test_a_plain_call_finds_what_the_function_finds() -> None:
    module = PlainModule()
    callback = SharpnessCallback(num_samples=1000, batch_size=40)
    with untouched(module):
        results = callback.analyze(module, train=loader(), val=loader(seed=1))
    assert set(results) == {"train", "val"}
    assert results is callback.results
    expected = sharpness(module, cross_entropy, list(loader(batch_size=40)))
    found = results["train"].metrics()
    # what rounding does depends on the order of the samples
    rounding = {"rounding", "trace_rounding", "asymmetry", "residual_max", "derivative_error", "curvature_error"}
    names = expected.metrics().keys() - rounding
    assert {name: found[name] for name in names} == pytest.approx(
        {name: expected.metrics()[name] for name in names}, rel=1e-4, abs=1e-7
    )
    assert 0 < results["val"].overlaps["train"] <= 1 and not results["train"].overlaps


def test_a_plain_call_takes_any_module_with_a_loss_and_batches() -> None:
    model = nn.Sequential(nn.Linear(NUM_FEATURES, 4), SparseMoE(4, 3, num_experts=2, expert_width=2))
    batches = list(loader())
    with untouched(model):
        assert SharpnessCallback(loss_fn=cross_entropy).analyze(model, train=batches)["train"].num_samples == 40
        landscape = LossLandscapeCallback(loss_fn=cross_entropy, line_points=3, plane_points=3)
        assert landscape.analyze(model, train=batches)["train"].plane is not None
        assert ExpertUtilizationCallback().analyze(model, val=batches)["val"].num_samples == 40
        timing = InferenceTimingCallback(batch_sizes=(1, 4), num_runs=2).analyze(model, test=batches)
        assert [row.batch_size for row in timing["test"].rows if row.module == "model"] == [1, 4]


def test_a_plain_call_raises() -> None:
    with pytest.raises(ValueError, match="train, val, test: expected data for at least one split, got none"):
        SharpnessCallback().analyze(PlainModule())
    with pytest.raises(
        MisconfigurationException, match=r"Linear: expected a training_step that returns the loss, got none\. Pass"
    ):
        SharpnessCallback().analyze(nn.Linear(NUM_FEATURES, 3), train=loader())
    with pytest.raises(MisconfigurationException, match="weights: expected 'last' without a Trainer"):
        SharpnessCallback(weights="best").analyze(PlainModule(), train=loader())
    with pytest.raises(
        MisconfigurationException, match="LazyLinear: expected initialized parameters, got a lazy weight"
    ):
        SharpnessCallback(loss_fn=cross_entropy).analyze(nn.LazyLinear(3), train=loader())

    def interrupted(model: nn.Module, batch: Any) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SharpnessCallback(loss_fn=interrupted).analyze(nn.Linear(NUM_FEATURES, 3), train=loader())


def test_a_plain_call_passes_the_modules_own_transfer_hooks() -> None:
    class Scaling(PlainModule):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch["x"], batch["y"]]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [10 * batch[0], batch[1]]

    module = Scaling()
    named = [{"x": x, "y": y} for x, y in loader()]
    found = SharpnessCallback(num_eigenvalues=1).analyze(module, train=named)["train"]
    expected = sharpness(module, cross_entropy, [(10 * x, y) for x, y in loader()], num_eigenvalues=1)
    assert found.eigenvalues[0] == pytest.approx(expected.eigenvalues[0], rel=1e-4)


def test_a_plain_call_writes_nothing_for_a_module_that_is_still_attached(tmp_path: Path) -> None:
    class Writing(PlainModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.logger.log_metrics({"by_hand": 1.0}, step=0)
            return super().training_step(batch, batch_idx)

    module, logger = Writing(), CSVLogger(tmp_path)
    run = trainer(logger=logger)
    run.fit(module, loader())
    before = len(logger.experiment.metrics)
    SharpnessCallback(num_eigenvalues=1).analyze(module, train=loader())
    assert len(logger.experiment.metrics) == before
    assert run.loggers == [logger]


def test_a_model_with_fewer_parameters_than_eigenvalues_gives_those_there_are() -> None:
    callback = SharpnessCallback(loss_fn=lambda m, b: m(b).square().mean())
    with pytest.warns(UserWarning, match="sharpness/train: λ2 did not converge: float32 does not resolve"):  # it is 0
        result = callback.analyze(nn.Linear(1, 1), train=[torch.ones(3, 1)])
    assert len(result["train"].eigenvalues) == 2


def test_one_tensor_in_place_of_a_loader_raises_an_error() -> None:
    with pytest.raises(ValueError, match="train: expected a loader or a list of batches, got one tensor"):
        SharpnessCallback(loss_fn=cross_entropy).analyze(nn.Linear(1, 1), train=torch.ones(3, 1))


def test_the_module_may_log_in_a_plain_call() -> None:
    class Child(LightningModule):
        def forward(self, x: Tensor) -> Tensor:
            self.log("inside", x.mean())
            return x

    class Parent(PlainModule):
        def __init__(self) -> None:
            super().__init__()
            self.child = Child()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.child(x))

    module = Parent()
    SharpnessCallback(num_eigenvalues=1).analyze(module, train=loader())
    assert "log" not in vars(module)
    assert "log" not in vars(module.child)


class Counted(FitEndAnalysis):
    name = "counted"
    needs_loss = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls = 0

    def compute(self, inputs: AnalysisInputs) -> int:
        self.calls += 1
        return self.calls

    def report(self, result: int) -> Report:
        return Report({"value": float(result)})


def test_the_same_weights_and_samples_are_analyzed_once_in_a_fit() -> None:
    counted = Counted(splits=["val", "test"], every_n_epochs=2)
    run, module = trainer(counted, max_epochs=4), PlainModule()
    with pytest.warns(UserWarning, match="no test data. Using val data instead"):
        run.fit(module, loader(), loader(seed=1))
    # the test split is the validation split, and the end of fit the fourth epoch
    assert counted.results == {"val": 2}
    assert counted.tracked == {"val": {1: {"value": 1.0}, 3: {"value": 2.0}}}
    assert run.callback_metrics["counted/val/value"] == 2
    run.validate(module, loader(seed=1), verbose=False)
    assert counted.results == {"val": 2}  # nothing is analyzed once more after a fit


def test_between_two_runs_nothing_is_known() -> None:
    class Text(PlainModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            """Nothing to do."""

    counted, module = Counted(stages=["validate"]), Text()
    run = trainer(counted)
    for number in (1, 2):
        run.validate(module, DataLoader([(torch.zeros(5), "a")] * 4), verbose=False)
        assert counted.results == {"val": number}


@pytest.mark.parametrize("changed", ["weights", "requires_grad", "text"])
def test_what_decides_a_result_decides_whether_it_is_known(changed: str) -> None:
    class Changing(PlainModule):
        def on_train_end(self) -> None:
            if changed == "weights":
                self.body[0].bias.data += 1
            if changed == "requires_grad":
                self.body[0].bias.requires_grad_(False)
            if changed == "text":
                data[0] = (data[0][0], "another")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).square().mean()

    data: list[Any] = [(torch.zeros(5), "a")] * 4
    counted = Counted(splits=["train"], every_n_epochs=1)
    trainer(counted).fit(Changing(), DataLoader(data, batch_size=2))
    assert counted.results == {"train": 2}


def test_a_second_plain_call_starts_from_scratch() -> None:
    counted, module = Counted(), PlainModule()
    before = snapshot(module)
    counted.analyze(module, train=loader(), val=loader())
    counted.analyze(module, test=loader())
    assert set(counted.results) == {"test"}
    assert_same(before, snapshot(module))


def test_an_unavailable_cuda_device_raises_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    batches = [torch.zeros(2, 3)]
    with pytest.raises(ValueError, match=r"device: expected an available device, got 'cuda'\. CUDA is not available"):
        InferenceTimingCallback(batch_sizes=(1,)).analyze(torch.nn.Linear(3, 2), test=batches, device="cuda")

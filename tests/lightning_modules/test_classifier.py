import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from moe_heads import Dense, SoftMoE
from moe_heads.lightning_modules import DigitsCNN, DigitsDataModule, FeatureExtractor, MoEClassifier
from tests.support.classifiers import MAKE_HEAD, NUM_CLASSES, NUM_FEATURES, backbone, loader, samples, sparse, trainer

pytestmark = pytest.mark.filterwarnings("ignore:GPU available but not used")


@pytest.fixture(params=MAKE_HEAD)
def head(request: pytest.FixtureRequest) -> nn.Module:
    return MAKE_HEAD[request.param]()


def test_fit_trains_every_parameter_and_logs_every_quantity(head: nn.Module) -> None:
    model = MoEClassifier(backbone(), head)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fit = trainer(max_epochs=2)
    fit.fit(model, loader(), loader())
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert set(fit.callback_metrics) == {
        *("train/loss", "train/accuracy", "train/aux_loss"),
        *("val/loss", "val/accuracy", "val/calibration_error"),
    }
    fit.test(model, loader(), verbose=False)
    assert set(fit.callback_metrics) == {"test/loss", "test/accuracy", "test/calibration_error"}


def test_training_data_alone_is_enough(head: nn.Module) -> None:
    fit = trainer(max_epochs=-1, max_steps=2)
    fit.fit(MoEClassifier(backbone(), head, schedule="constant"), loader())
    assert fit.global_step == 2


def test_validation_metrics_are_those_of_all_samples() -> None:
    data = samples(21)
    x, labels = data.tensors
    model = MoEClassifier(backbone(), sparse())
    metrics = trainer().validate(model, loader(data), verbose=False)[0]
    with torch.no_grad():
        logits = model.eval()(x)
    probs = logits.double().softmax(-1)
    assert metrics["val/loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert metrics["val/accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))
    confidence, predicted = probs.max(-1)
    bins = (confidence * 15).ceil().long() - 1
    error = sum(
        abs(float((confidence - (predicted == labels).double())[bins == i].sum())) / len(labels) for i in range(15)
    )
    assert metrics["val/calibration_error"] == pytest.approx(error, rel=1e-4)


def test_logits_between_0_and_1_are_not_taken_for_probabilities() -> None:
    model = MoEClassifier(nn.Identity(), nn.Identity(), num_classes=2)
    data = TensorDataset(torch.tensor([[0.9, 0.1]] * 4), torch.zeros(4).long())
    metrics = trainer().validate(model, loader(data), verbose=False)[0]
    assert metrics["val/calibration_error"] == pytest.approx(1 - 1 / (1 + math.exp(-0.8)), rel=1e-5)


@pytest.mark.parametrize("where", ["head", "inside the head", "inside the backbone", "in both"])
def test_balance_losses_are_trained_wherever_the_router_sits(where: str) -> None:
    def make() -> MoEClassifier:
        torch.manual_seed(1)
        soft = {"num_experts": 4, "expert_width": 5, "balance": {"kl": 0.3}, "dropout": 0.0}
        last = SoftMoE(NUM_FEATURES, NUM_CLASSES, **soft)
        inner = SoftMoE(NUM_FEATURES, NUM_FEATURES, **soft)
        plain = nn.Linear(NUM_FEATURES, NUM_CLASSES)
        match where:
            case "head":
                return MoEClassifier(backbone(), last)
            case "inside the head":
                return MoEClassifier(backbone(), nn.Sequential(nn.ReLU(), last), num_classes=NUM_CLASSES)
            case "inside the backbone":
                return MoEClassifier(FeatureExtractor(inner, NUM_FEATURES), plain)
            case _:
                return MoEClassifier(FeatureExtractor(inner, NUM_FEATURES), last)

    x, labels = samples().tensors
    model = make()
    expected = torch.zeros(())
    features = x
    for module in [m for m in model.modules() if isinstance(m, SoftMoE)]:
        features = features.relu() if where == "inside the head" else features
        features, aux_loss, _ = module(features, return_routing=True)
        expected += aux_loss.detach()
    assert expected > 0
    fit = trainer(limit_train_batches=1)
    fit.fit(make(), loader(TensorDataset(x, labels), batch_size=24))
    assert float(fit.callback_metrics["train/aux_loss"]) == pytest.approx(float(expected), rel=1e-5)
    task = F.cross_entropy(make()(x), labels)
    assert float(fit.callback_metrics["train/loss"]) == pytest.approx(float(expected + task.detach()), rel=1e-5)


def test_label_smoothing_reaches_the_training_loss_only() -> None:
    data = samples()
    x, labels = data.tensors
    model = MoEClassifier(backbone(), nn.Linear(NUM_FEATURES, NUM_CLASSES), label_smoothing=0.2)
    logits = model(x).detach()
    fit = trainer()
    validated = fit.validate(model, loader(data), verbose=False)[0]
    assert validated["val/loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    fit.fit(model, loader(data, batch_size=24))
    smoothed = 0.8 * F.cross_entropy(logits, labels) - 0.2 * logits.log_softmax(-1).mean()
    assert float(fit.callback_metrics["train/loss"]) == pytest.approx(float(smoothed), rel=1e-5)


def test_analysis_loss_and_accuracy_are_the_task_alone() -> None:
    x, labels = samples().tensors
    model = MoEClassifier(backbone(), sparse(), label_smoothing=0.2).eval()
    log_probs = model(x).double().log_softmax(-1)
    loss = model.analysis_loss((x, labels))
    assert loss.requires_grad
    expected = -log_probs[torch.arange(24), labels].mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert float(model.analysis_accuracy((x, labels))) == pytest.approx(
        sum(int(p == y) for p, y in zip(log_probs.argmax(-1), labels, strict=True)) / 24
    )


class NoHostSync(TorchDispatchMode):
    """Fails where a tensor's value, or the size of a result that depends on values, is needed on the host."""

    READING = ("_local_scalar_dense", "_unique2", "unique_dim", "nonzero", "masked_select", "bincount")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.READING, f"{func}: a value was read on the host"
        return func(*args, **(kwargs or {}))


class GuardedSteps(MoEClassifier):
    num_guarded = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        GuardedSteps.num_guarded += 1
        with NoHostSync():
            return super().training_step(batch, batch_idx)


def test_training_steps_do_not_synchronize_with_the_host(head: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="read on the host"), NoHostSync():
        torch.ones(()).item()
    monkeypatch.setattr(GuardedSteps, "num_guarded", 0)
    trainer().fit(GuardedSteps(backbone(), head), loader())
    assert GuardedSteps.num_guarded == 3


def test_optimizer_has_the_settings_of_the_study_by_default() -> None:
    model = MoEClassifier(backbone(), sparse(), schedule="constant")
    optimizer = model.configure_optimizers()
    assert type(optimizer) is torch.optim.SGD
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.1, 0.9, 5e-4, False)
    assert len(group["params"]) == len(list(model.parameters()))


def test_no_epochs_at_all() -> None:
    trainer(max_epochs=0).fit(MoEClassifier(backbone(), sparse()), loader())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_are_refused_before_training(bad: float) -> None:
    data = samples()
    data.tensors[0][[1, 4, 5]] = bad
    model = MoEClassifier(backbone(), nn.Linear(NUM_FEATURES, NUM_CLASSES))
    before = model.head.weight.clone()
    with pytest.raises(ValueError, match=r"logits: expected finite .* in 3 of 8 rows of a validation batch before"):
        trainer().fit(model, loader(), loader(data))
    assert torch.equal(model.head.weight, before)


def test_data_with_another_number_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="head: expected 10 classes, the number of the data module, got 3"):
        trainer().fit(MoEClassifier(DigitsCNN(), Dense(64, 3)), DigitsDataModule())


def test_a_data_module_that_does_not_tell_its_classes() -> None:
    class Data(LightningDataModule):
        def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
            return loader()

    trainer().fit(MoEClassifier(backbone(), sparse()), Data())


def test_number_of_classes() -> None:
    assert MoEClassifier(nn.Identity(), nn.Linear(4, 5)).num_classes == 5
    assert MoEClassifier(nn.Identity(), Dense(4, 6)).num_classes == 6
    assert MoEClassifier(nn.Identity(), nn.Identity(), num_classes=7).num_classes == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, r"learning_rate: expected a finite number above 0, got 0\.0"),
        ({"momentum": 1.0}, r"momentum: expected a number in \[0, 1\), got 1\.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing: expected a number in \[0, 1\), got -0\.1"),
        ({"weight_decay": -1e-4}, r"weight_decay: expected a finite number of at least 0, got -0\.0001"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov: expected False with momentum 0, got True"),
        ({"nesterov": "False"}, "nesterov: expected True or False, got 'False'"),
        ({"schedule": "step"}, "schedule: expected one of 'cosine', 'linear', 'constant', got 'step'"),
        ({"head": nn.Identity()}, "num_classes: expected a number, since Identity has neither .* got None"),
        ({"num_classes": 4}, "num_classes: expected 3, the number of logits of the head, got 4"),
        ({"num_classes": 0}, "num_classes: expected an integer of at least 1, got 0"),
        ({"head": Dense(5, 3)}, "head: expected in_features=6, the num_features of the backbone, got 5"),
        ({"head": "SparseMoE"}, "head: expected a torch.nn.Module, got 'SparseMoE'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEClassifier(**({"backbone": backbone(), "head": sparse()} | options))


def test_digits_are_learnt() -> None:
    fit = trainer(max_epochs=3)
    fit.fit(MoEClassifier(DigitsCNN(), Dense(64, 10, width=64)), DigitsDataModule())
    assert fit.callback_metrics["val/accuracy"] > 0.7


@pytest.mark.gpu
def test_training_steps_do_not_synchronize_with_the_gpu(head: nn.Module) -> None:
    class Guarded(MoEClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return super().training_step(batch, batch_idx)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    fit = Trainer(accelerator="gpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False)
    fit.fit(Guarded(backbone(), head), loader())
    assert fit.global_step == 3


@pytest.mark.filterwarnings("ignore:Total length of `")
def test_an_empty_training_loader_is_refused_before_training() -> None:
    model = MoEClassifier(backbone(), nn.Linear(NUM_FEATURES, NUM_CLASSES))
    empty = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(0, 3), torch.zeros(0)))
    with pytest.raises(ValueError, match="train loader: expected at least one batch, got an empty loader"):
        trainer().fit(model, empty)


def test_weights_that_are_not_finite_are_refused_before_training() -> None:
    model = MoEClassifier(backbone(), nn.Linear(NUM_FEATURES, NUM_CLASSES))
    nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(ValueError, match=r"weights: expected finite numbers .* got nan or infinity in head.bias"):
        trainer(num_sanity_val_steps=0).fit(model, loader())

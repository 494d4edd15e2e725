"""Which analyses run under which strategy, and the batches of ranks that work in step."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.callbacks import ExpertUtilizationCallback, LossLandscapeCallback, SharpnessCallback
from moe_heads.callbacks._shared import sharding
from moe_heads.callbacks._shared.plain_context import PlainContext
from moe_heads.callbacks._shared.sharding import batches_in_step, check_deterministic, is_left_out, key_over_ranks
from tests.support.lightning_models import PlainModule, loader, trainer


class Fake:
    callbacks: tuple[Any, ...] = ()

    def __init__(self, kind: type, tensor_parallel_size: int = 1) -> None:
        self.strategy: Any = object.__new__(kind)
        self.strategy._tensor_parallel_size = tensor_parallel_size


class TwoRanks(Ranks):
    """Rank zero of two; the other one returns given values."""

    def __init__(self, *others: Any) -> None:
        super().__init__(name="sharpness/train")
        self.size, self.others = 2, list(others)

    def gather(self, value: Any) -> list[Any]:
        return [value, self.others.pop(0)]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(sharding, "is_sharded", lambda model: True)
    return nn.Linear(2, 1)


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_other_sharded_strategies_raise_an_error(kind: type) -> None:
    with pytest.raises(MisconfigurationException, match="expected a strategy with the whole model in every process"):
        is_left_out(Fake(kind), "A", "last", "", "warn")


def test_an_analysis_without_a_reason_runs() -> None:
    assert not is_left_out(Fake(ModelParallelStrategy), "A", "last", "", "raise")
    assert not is_left_out(trainer(), "A", "best", "a reason", "raise")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unsupported": "it times alone"}, "A: left out under ModelParallelStrategy: it times alone. Analyze a check"),
        ({"weights": "best"}, "weights='best' would load a checkpoint .* Analyze weights='last'"),
        ({"size": 2}, "the parameters are also divided by tensor_parallel_size=2"),
    ],
)
def test_an_analysis_that_cannot_run_is_left_out_with_the_reason(options: dict[str, Any], message: str) -> None:
    given = {"size": 1, "weights": "last", "unsupported": ""} | options
    fake = Fake(ModelParallelStrategy, given["size"])
    with pytest.warns(UserWarning, match=message):
        assert is_left_out(fake, "A", given["weights"], given["unsupported"], "warn")
    with pytest.raises(MisconfigurationException, match=message):
        is_left_out(fake, "A", given["weights"], given["unsupported"], "raise")


@pytest.mark.parametrize(
    ("analysis", "reason"),
    [
        (SharpnessCallback(), ""),
        (SharpnessCallback(params=["head"], perturbation=True), ""),
        (SharpnessCallback(perturbation=True), "perturbation=True needs whole parameters"),
        (SharpnessCallback(engine="pyhessian"), "torch.autograd.grad"),
        (LossLandscapeCallback(), ""),
        (ExpertUtilizationCallback(), ""),
        (ExpertUtilizationCallback(ablation=True), "ablation=True"),
    ],
)
def test_reasons_depend_on_the_options(analysis: Any, reason: str) -> None:
    found = analysis.unsupported_if_sharded()
    assert reason in found
    assert bool(found) == bool(reason)


def test_an_analysis_that_is_left_out_does_nothing_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "moe_heads.callbacks.base.is_left_out", lambda trainer, owner, *rest: owner == "SharpnessCallback"
    )
    left_out = SharpnessCallback(splits=["train"], num_samples=8)
    other = ExpertUtilizationCallback(splits=["train"], num_samples=8)
    trainer(left_out, other, max_epochs=0).fit(PlainModule(), loader())
    assert not left_out.results
    assert "train" in other.results


def test_a_trajectory_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_heads.callbacks.loss_landscape.is_sharded", lambda model: True)
    landscape = LossLandscapeCallback(trajectory=True, stages=["validate"])
    with pytest.warns(UserWarning, match="LossLandscapeCallback: no trajectory, because the model is sharded"):
        landscape.begin_fit(PlainContext({}), PlainModule())
    assert not landscape._history


def batches(*sizes: int) -> Batches:
    return Batches([torch.randn(size, 2) for size in sizes], sizes)


def test_all_ranks_keep_the_same_number_of_batches(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match="sharpness/train: 5 samples are left out, because all ranks"):
        kept = batches_in_step(model, batches(4, 4, 3), TwoRanks(2, 2))
    assert kept is not None
    assert kept.sizes == (4, 4)


def test_nothing_is_left_out_of_equal_shares(model: nn.Module) -> None:
    share = batches(4, 3)
    kept = batches_in_step(model, share, TwoRanks(2, 0))
    assert kept is not None
    assert kept.sizes == share.sizes


def test_a_rank_without_samples_and_a_random_loss_raise_an_error(model: nn.Module) -> None:
    with pytest.raises(MisconfigurationException, match="expected samples for each of the 2 ranks"):
        batches_in_step(model, None, TwoRanks())
    with pytest.raises(MisconfigurationException, match="draws no random numbers"):
        check_deterministic(model, TwoRanks(), is_random=True)


def test_the_key_covers_the_parameters_of_all_ranks(model: nn.Module) -> None:
    keys = {key_over_ranks(model, b"key", TwoRanks(other)) for other in (b"one", b"two")}
    assert len(keys) == 2


def test_models_in_one_piece_are_not_affected() -> None:
    whole, share = nn.Linear(2, 1), batches(4)
    assert batches_in_step(whole, share, TwoRanks()) is share
    assert batches_in_step(whole, None, TwoRanks()) is None
    assert key_over_ranks(whole, b"key", TwoRanks()) == b"key"
    check_deterministic(whole, TwoRanks(), is_random=True)

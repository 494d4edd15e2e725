"""Additions of the sharpness callback to the function: splits, epochs, engines, and quantities beyond the spectrum."""

import sys
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from moe_heads import NOISY_TOP_K, SparseMoE
from moe_heads.callbacks import LossLandscapeCallback, SharpnessCallback
from tests.support.hessians import cross_entropy
from tests.support.lightning_models import NUM_FEATURES, PlainModule, loader, trainer


def sparse_model() -> nn.Module:
    torch.manual_seed(0)
    head = SparseMoE(6, 3, num_experts=3, expert_width=4, k=1, **NOISY_TOP_K)
    return nn.Sequential(nn.Linear(NUM_FEATURES, 6), nn.Tanh(), head)


def test_what_goes_with_the_spectrum_of_a_sparse_head() -> None:
    callback = SharpnessCallback(loss_fn=cross_entropy, perturbation=True, block_eigenvalues=True, batch_size=8)
    results = callback.analyze(sparse_model(), train=loader(), test=loader(seed=1))
    train, test = results["train"], results["test"]
    assert list(train.blocks) == ["backbone", "router", "experts"] and len(train.experts) == 3
    assert set(test.overlaps) == {"train"} and not train.overlaps
    assert train.routing is not None and train.routing.steps == (0.01, -0.01, 0.1, -0.1, 0.5, -0.5)
    # the second difference with the routing held fixed is the quadratic form of the Hessian
    assert train.routing.curvature_fixed(0.01) == pytest.approx(train.eigenvalues[0], rel=0.02)
    assert train.perturbation is not None and train.perturbation.worst >= train.perturbation.sam
    metrics = train.metrics()
    assert {"routing_flips_0.1", "perturbation_worst", "trace_router", "lambda_max_experts"} <= set(metrics)
    assert all(
        name in train.summary() for name in ("**Along the first eigenvector**", "**Perturbations**", "| expert |")
    )
    assert {"spectrum", "blocks"} == set(callback.report(train).figures)


def test_restricted_to_the_head() -> None:
    callback = SharpnessCallback(loss_fn=cross_entropy, params=["2"], splits=["train"], batch_size=8)
    result = callback.analyze(sparse_model(), train=loader())["train"]
    assert all(name.startswith("2.") for name in result.parameter_names)
    # the direction of the routing response is zero outside of the head
    assert result.routing is not None and result.routing.flips is not None
    assert list(result.blocks) == ["router", "experts"]


def test_a_landscape_does_not_take_the_eigenvector_of_a_part() -> None:
    part = SharpnessCallback(params=["layers.0"], splits=["train"])
    whole = LossLandscapeCallback(splits=["train"], plane_splits=[], line_points=3)
    module = PlainModule()
    names = [name for name, _ in module.named_parameters()]
    part.params = [names[0]]
    run = trainer(part, whole)
    run.fit(module, loader())
    assert part.results["train"].parameter_names == (names[0],)
    assert whole.results["train"].line is not None


class Momentum(PlainModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


def test_tracked_epochs_start_from_the_last_and_draw_the_threshold(tmp_path: Any) -> None:
    callback = SharpnessCallback(every_n_epochs=1, splits=["train"], num_eigenvalues=2)
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    run = Trainer(
        max_epochs=3,
        logger=logger,
        accelerator="cpu",
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    run.fit(Momentum(), loader())
    tracked = callback.tracked["train"]
    assert list(tracked) == [0, 1, 2]
    assert all(metrics["stability_threshold"] == pytest.approx(2 * 1.5 / 0.1) for metrics in tracked.values())
    # what the start saves the check for missing eigenvalues takes again, on so small a network
    assert tracked[2]["num_products"] <= tracked[0]["num_products"] + 5
    final = callback.results["train"]
    # the last epoch and the end of fit are about the same weights, but the first of them left out the density
    assert final.density is not None
    assert final.eigenvalues[0] == pytest.approx(tracked[2]["lambda_max"], rel=1e-4)
    assert {epoch: value for epoch, (value, _) in final.history.items()} == {
        epoch: metrics["lambda_max"] for epoch, metrics in tracked.items()
    }
    events = EventAccumulator(str(logger.log_dir), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert "sharpness/train/tracking" in events.Tags()["images"]
    assert len(events.Scalars("sharpness/train/stability_threshold")) >= 3


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_the_threshold_of_a_fit_that_is_analyzed_in_a_later_run(tmp_path: Any) -> None:
    """A checkpoint of the last epoch is resumed: there is no further step, and the last one had its threshold."""
    options = {"splits": ["train"], "num_eigenvalues": 1, "density": False}
    keeper = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    trainer(SharpnessCallback(stages=["test"], **options), keeper, enable_checkpointing=True).fit(Momentum(), loader())
    again = SharpnessCallback(**options)
    trainer(again).fit(Momentum(), loader(), ckpt_path=keeper.last_model_path)
    assert again.results["train"].stability_threshold == pytest.approx(2 * 1.5 / 0.1)
    trainer(again).fit(PlainModule(), loader())
    assert again.results["train"].stability_threshold == pytest.approx(2 * 1.9 / 0.05)
    assert SharpnessCallback().kept_in_checkpoints() == {}


def test_without_density_the_last_tracked_epoch_is_the_end_of_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = SharpnessCallback.compute

    def counted(self: SharpnessCallback, inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(self, inputs)

    monkeypatch.setattr(SharpnessCallback, "compute", counted)
    callback = SharpnessCallback(every_n_epochs=1, splits=["train"], num_eigenvalues=2, density=False)
    trainer(callback).fit(PlainModule(), loader())
    assert calls == 1 and callback.results["train"].density is None


@pytest.mark.slow
def test_the_published_engine_reports_its_defects() -> None:
    callback = SharpnessCallback(loss_fn=cross_entropy, engine="pyhessian", splits=["train"], batch_size=8)
    model = sparse_model()
    result = callback.analyze(model, train=loader())["train"]
    ours = SharpnessCallback(loss_fn=cross_entropy, splits=["train"], batch_size=8).analyze(model, train=loader())[
        "train"
    ]
    assert result.engine == "pyhessian" and callback.over_ranks == "rank_zero"
    assert result.eigenvalues[0] == pytest.approx(ours.eigenvalues[0], rel=0.05)
    assert result.routing is None and result.perturbation is None
    assert any(failure.startswith("density") for failure in result.failures)
    assert "**PyHessian**: density" in result.summary() and "power iteration" in result.summary()
    assert sum(block.shares[0] for block in result.blocks.values()) == pytest.approx(1, abs=1e-5)
    assert "lambda_min" not in result.metrics()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "scipy"}, r"engine: expected one of 'lanczos', 'pyhessian', got 'scipy'"),
        ({"routing_steps": [0.1, -1]}, r"routing_steps\[1\]: expected a finite number above 0, got -1"),
        ({"trace_tolerance": 0}, "trace_tolerance: expected a finite number above 0, got 0"),
        ({"routing_steps": [0.1, 0.1]}, "routing_steps: expected distinct numbers, got"),
        ({"params": []}, r"params: expected at least one name of a parameter or module, got \[\]"),
        ({"blocks": {"head": "gate"}}, r"blocks\['head'\]: expected a list of names of parameters or modules, got"),
        ({"engine": "pyhessian", "blocks": {"all": [""]}}, "blocks: expected its default with engine='pyhessian', got"),
        ({"engine": "pyhessian", "tolerance": 1e-4}, "tolerance: expected its default with engine='pyhessian', got"),
        ({"engine": "pyhessian", "graph_memory": 0}, "graph_memory: expected its default with engine='pyhessian', got"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharpnessCallback(**options)


def test_memory_bounds_are_checked_before_training_and_reach_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"basis_memory: expected at least .* bytes, 8 vectors of .* parameters"):
        trainer(SharpnessCallback(basis_memory=10)).fit(PlainModule(), loader())
    with pytest.raises(ValueError, match="graph_memory: expected an integer of at least 0 or None, got -1"):
        SharpnessCallback(graph_memory=-1)
    with monkeypatch.context() as context:
        module = sys.modules["moe_heads.analysis.sharpness.hessian.lanczos"]
        context.setattr(module, "available_memory", lambda: 6 * 4 * sum(p.numel() for p in PlainModule().parameters()))
        with pytest.raises(
            ValueError, match=r"num_eigenvalues: expected at most 3, got 5: 8 vectors of .* numbers take"
        ):
            trainer(SharpnessCallback()).fit(PlainModule(), loader())
    callback = SharpnessCallback(loss_fn=cross_entropy, graph_memory=0, splits=["train"])
    assert callback.analyze(sparse_model(), train=loader())["train"].graph_mode == "rebuilt"


def test_perturbations_and_routing_start_from_the_loss_of_the_hessian() -> None:
    callback = SharpnessCallback(loss_fn=cross_entropy, perturbation=True, splits=["train"])
    result = callback.analyze(sparse_model(), train=loader())["train"]
    assert result.perturbation is not None
    assert result.center_loss == pytest.approx(result.perturbation.center_loss, rel=1e-5)

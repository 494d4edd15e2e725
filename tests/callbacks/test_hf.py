"""TransformersCallback: the numbers of the plain functions, and a training bit for bit as without it."""

import copy
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from transformers.integrations.integration_utils import TensorBoardCallback

from moe_heads import SparseMoE, collect_routing
from moe_heads.analysis import expert_utilization
from moe_heads.analysis import sharpness as plain_sharpness
from moe_heads.callbacks import InferenceTimingCallback
from moe_heads.callbacks._shared.transformers_access import reason_to_leave_out
from moe_heads.callbacks.hf import TransformersCallback
from tests.support.language_models import VOCABULARY
from tests.support.processes import run_on_ranks
from tests.support.sources import ROOT
from tests.support.transformers_runs import (
    NORM,
    QUICK,
    gpt2,
    lines,
    losses,
    mixtral,
    sample,
    sharpness,
    steps_of,
    trainer,
    utilization,
)


def plain(model: nn.Module, batches: list[dict[str, Tensor]], **options: Any) -> Any:
    return plain_sharpness(
        model.eval(),
        lambda model, batch: model(**batch).loss,
        batches,
        batch_weight_fn=lambda batch: (batch["labels"][:, 1:] != -100).sum(),
        **{"params": [NORM["gpt2"]], **QUICK, **options},
    )


def assert_same_training(one: Any, other: Any) -> None:
    """Weights, optimizer, scheduler and losses are equal bit for bit."""
    assert losses(one) == losses(other)
    for first, second in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(first, second)
    states = [list(run.optimizer.state_dict()["state"].values()) for run in (one, other)]
    for first, second in zip(*states, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert one.lr_scheduler.state_dict() == other.lr_scheduler.state_dict()
    assert [module.training for module in one.model.modules()] == [module.training for module in other.model.modules()]
    assert not any(module._forward_pre_hooks for module in one.model.modules())


def generator_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("make", [gpt2, mixtral])
def test_numbers_of_the_plain_function_and_the_training_as_without(make: Any, tmp_path: Path) -> None:
    curvature, experts = (
        sharpness(every_n_train_steps=2, params=None, num_samples=4, batch_size=2),
        utilization(every_n_train_steps=1),
    )
    callback = TransformersCallback([curvature, experts])
    # dropout draws random numbers in every step
    options = {"attention_dropout": 0.1} if make is mixtral else {}
    runs, states = [], []
    for callbacks in ([callback], []):
        runs.append(trainer(make(**options), tmp_path, *callbacks))
        torch.manual_seed(7)
        runs[-1].train()
        states.append(generator_states())
    assert_same_training(*runs)
    assert states[0] == states[1]

    batches = sample(lines(), 4, 2)
    expected = plain(runs[0].model, batches, params=None)
    found = curvature.results["train"]
    assert found.eigenvalues == expected.eigenvalues and found.residuals == expected.residuals
    assert found.trace == expected.trace and found.center_loss == expected.center_loss
    assert steps_of(runs[0], "sharpness/train/lambda_max") == [2, 3]
    assert callback.metrics["sharpness/train/lambda_max"] == found.eigenvalues[0]
    if make is mixtral:
        result = expert_utilization(runs[0].model, sample(lines(), 12, 4), num_permutations=0, num_examples=0)
        for name, head in result.heads.items():
            assert torch.equal(experts.results["train"].heads[name].load, head.load)
        assert steps_of(runs[0], "expert_utilization/step/model.layers.0.mlp/load_0") == [1, 2, 3]


def test_the_gauss_newton_matrix_takes_logits_and_loss_of_the_model(tmp_path: Path) -> None:
    options = {"matrix": "gauss_newton", "params": ["transformer.ln_f"], "density": False}
    curvature = sharpness(num_samples=4, batch_size=2, **options)
    run = trainer(gpt2(), tmp_path, TransformersCallback(curvature))
    run.train()
    expected = plain(run.model, sample(lines(), 4, 2), **options)
    found = curvature.results["train"]
    assert found.matrix == "gauss_newton" and found.eigenvalues_converged and found.eigenvalues == expected.eigenvalues
    assert steps_of(run, "gauss_newton/train/lambda_max") == [3]


def test_padding_counts_in_no_number_of_the_training(tmp_path: Path) -> None:
    experts = utilization(every_n_train_steps=1)
    parts = {"eval_dataset": lines(4, start=40)}
    run = trainer(
        mixtral(),
        tmp_path,
        TransformersCallback(experts),
        parts=parts,
        learning_rate=0.0,
        train_sampling_strategy="sequential",
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    run.train()
    counts = []
    with torch.no_grad():
        for line in lines():
            with collect_routing(run.model) as routing:
                # alone and without padding
                run.model(input_ids=line["input_ids"][line["attention_mask"] == 1][None])
            counts.append(routing.stats["model.layers.0.mlp"].counts)
    # two batches of four lines make a step, and the third batch is alone
    expected = [sum(counts[:8]), sum(counts[8:]), sum(counts[:8]), sum(counts[8:])]
    found = experts.history_steps["model.layers.0.mlp"]
    assert list(found) == [1, 2, 3, 4]
    assert all(torch.equal(stats.counts, each) for stats, each in zip(found.values(), expected, strict=True))
    assert list(experts.history["model.layers.0.mlp"]) == [0, 1]
    assert torch.equal(experts.history["model.layers.0.mlp"][1].counts, sum(counts))


def test_weights_in_half_precision_are_analyzed_in_float32(tmp_path: Path) -> None:
    model = gpt2().bfloat16()
    curvature = sharpness()
    run = trainer(model, tmp_path, TransformersCallback(curvature))
    with pytest.warns(UserWarning, match="'transformer.wte.weight' is in half precision: a copy in float32"):
        run.train()
    reference = trainer(gpt2().bfloat16(), tmp_path)
    reference.train()
    assert_same_training(run, reference)
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}
    expected = plain(copy.deepcopy(run.model).float(), sample(lines(), 8, 4))
    assert curvature.results["train"].eigenvalues == expected.eigenvalues
    assert curvature.results["train"].trace == expected.trace


def test_autocast_is_off(tmp_path: Path) -> None:
    curvature = sharpness()
    run = trainer(gpt2(), tmp_path, TransformersCallback(curvature), bf16=True)
    run.train()
    reference = trainer(gpt2(), tmp_path, bf16=True)
    reference.train()
    assert_same_training(run, reference)
    model = gpt2()
    model.load_state_dict(run.model.state_dict())
    # under autocast, the error would be 1e-3
    found, expected = curvature.results["train"].eigenvalues[0], plain(model, sample(lines(), 8, 4)).eigenvalues[0]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_with_checkpointing(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        return peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True))

    name = "base_model.model.transformer.h.0.attn.c_attn.lora_B"
    curvature, one = sharpness(params=None), sharpness(params=[name], name="lora_b")
    torch.manual_seed(1)
    run = trainer(adapted(), tmp_path, TransformersCallback([curvature, one]), gradient_checkpointing=True)
    run.train()
    assert run.model.base_model.model.is_gradient_checkpointing
    expected = plain(run.model, sample(lines(), 8, 4), params=None)
    assert curvature.results["train"].num_parameters == sum(
        p.numel() for p in run.model.parameters() if p.requires_grad
    )
    assert curvature.results["train"].eigenvalues == expected.eigenvalues
    assert one.results["train"].num_parameters == 2 * 48
    assert one.results["train"].eigenvalues == plain(run.model, sample(lines(), 8, 4), params=[name]).eigenvalues


class Classifier(nn.Module):
    """A module that is no model of transformers."""

    def __init__(self, num_experts: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = SparseMoE(8, 3, num_experts=num_experts, expert_width=4)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.embedding(input_ids).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def labeled() -> list[dict[str, Any]]:
    return [{"input_ids": line["input_ids"], "labels": number % 3} for number, line in enumerate(lines())]


def test_a_resumed_training_continues_the_records(tmp_path: Path) -> None:
    found, eigenvalues = [], []
    for resumed in (None, str(tmp_path / "checkpoint-4")):
        experts, curvature = (
            utilization(every_n_train_steps=1),
            sharpness(every_n_train_steps=3, check_every_n_points=1, params=[NORM["classifier"]]),
        )
        callback = TransformersCallback([experts, curvature])
        options = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
        run = trainer(Classifier(), tmp_path, callback, parts={"train_dataset": labeled()}, **options)
        run.train(resume_from_checkpoint=resumed)
        windows = {at: stats.counts.tolist() for at, stats in experts.history_steps["head"].items()}
        # the second epoch is not in a checkpoint from its middle
        epochs = list(experts.history["head"]), experts.history["head"][0].counts.tolist()
        found.append((windows, epochs, steps_of(run, "sharpness/train/lambda_max"), losses(run)))
        eigenvalues.append(curvature.results["train"].eigenvalues[0])
    assert found[0] == found[1]
    # the iteration starts from the eigenvector of the previous analysis, if there is one
    assert eigenvalues[0] == pytest.approx(eigenvalues[1], rel=1e-4)
    assert found[0][2] == [3, 6] and list(found[0][0]) == [1, 2, 3, 4, 5, 6]

    (tmp_path / "checkpoint-4" / "moe_heads.pt").unlink()
    experts = utilization(every_n_train_steps=1)
    run = trainer(
        Classifier(), tmp_path, TransformersCallback(experts), parts={"train_dataset": labeled()}, num_train_epochs=2
    )
    with pytest.warns(UserWarning, match="the checkpoint of step 4 was written without this callback"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert list(experts.history_steps["head"]) == [5, 6]


def test_a_second_training_keeps_nothing_of_the_first(tmp_path: Path) -> None:
    experts, curvature = utilization(), sharpness(params=[NORM["classifier"]], every_n_epochs=1)
    callback = TransformersCallback([experts, curvature])
    parts = {"train_dataset": labeled()}
    trainer(Classifier(num_experts=4), tmp_path, callback, parts=parts, num_train_epochs=2).train()
    assert callback._context is None and list(curvature.tracked["train"]) == [0, 1]
    run = trainer(Classifier(num_experts=6), tmp_path, callback, parts=parts)
    run.train()
    assert (
        list(experts.history["head"]) == list(curvature.tracked["train"]) == [0]
        and len(experts.history["head"][0].counts) == 6
    )
    alone = sharpness(params=[NORM["classifier"]])
    again = trainer(Classifier(num_experts=6), tmp_path, TransformersCallback(alone), parts=parts)
    again.train()
    assert alone.results["train"].eigenvalues == curvature.results["train"].eigenvalues
    assert_same_training(run, again)


def test_the_best_weights_are_loaded_before_the_analyses(tmp_path: Path) -> None:
    curvature = sharpness(splits=["test"], num_samples=4)
    run = trainer(
        gpt2(),
        tmp_path,
        TransformersCallback(curvature),
        parts={"eval_dataset": {"a": lines(4), "b": lines(8)}},
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="a_loss",
        greater_is_better=True,  # the loss falls, so that the first checkpoint is the best
    )
    with pytest.warns(UserWarning, match="there are no test data. Using val data instead"):
        run.train()
    assert run.state.best_global_step < run.state.global_step
    best = gpt2()
    best.load_state_dict(type(best).from_pretrained(run.state.best_model_checkpoint).state_dict())
    expected = float(best.eval()(**sample(lines(4), 4, 4)[0]).loss.detach())
    assert curvature.results["val"].center_loss == pytest.approx(expected, rel=1e-6)


def test_numbers_figures_and_texts_in_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = SummaryWriter(str(tmp_path / "own"))
    callback = TransformersCallback([sharpness(every_n_train_steps=2, params=[NORM["mixtral"]]), utilization()])
    # before this callback, as those of report_to
    run = trainer(mixtral(), tmp_path, TensorBoardCallback(writer), callback)
    run.train()
    events = EventAccumulator(str(tmp_path / "own"), size_guidance={"tensors": 0, "images": 0}).Reload()
    points = events.Scalars("train/sharpness/train/lambda_max")
    assert [point.step for point in points] == [2, 3]
    assert points[-1].value == pytest.approx(callback.metrics["sharpness/train/lambda_max"])
    assert "train/expert_utilization/epoch/model.layers.0.mlp/load_0" in events.Tags()["scalars"]
    assert "train/sharpness/train/spectrum" in events.Tags()["images"]
    assert "train/sharpness/train/summary/text_summary" in events.Tags()["tensors"]
    # the training loss of the step at which the analysis ran, and no analysis among the lines of the terminal
    assert steps_of(run, "loss") == [1, 2, 3]
    printed = capsys.readouterr().out
    assert "'loss'" in printed and "lambda_max" not in printed


def test_a_loss_that_logs_and_collects(tmp_path: Path) -> None:
    class Counting(transformers.Trainer):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.seen: list[float] = []
            self.number = 0

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **options)
            self.seen.append(float(loss.detach()))
            self.number += 1
            self.log({"mine": self.seen[-1]})
            return 2 * loss

    curvature = sharpness()
    run = trainer(gpt2(), tmp_path, TransformersCallback(curvature), cls=Counting)
    run.train()
    assert run.number == len(run.seen) == len(steps_of(run, "mine")) == 3
    expected = plain(run.model, sample(lines(), 8, 4))
    assert curvature.results["train"].center_loss == pytest.approx(2 * expected.center_loss, rel=1e-6)
    assert curvature.results["train"].eigenvalues[0] == pytest.approx(2 * expected.eigenvalues[0], rel=1e-3)


def test_the_trainer_is_found_or_attached(tmp_path: Path) -> None:
    curvature = sharpness()
    callback = TransformersCallback(curvature)
    run = trainer(gpt2(), tmp_path)
    assert callback.attach(run) is callback and callback.attach(run) is callback
    assert run.callback_handler.callbacks.count(callback) == 1
    run.train()
    assert curvature.results["train"].num_samples == 8
    stray = TransformersCallback(sharpness())
    with pytest.raises(MisconfigurationException, match=r"found none. Call callback.attach"):
        stray.on_train_begin(run.args, run.state, run.control)
    with pytest.raises(ValueError, match=r"trainer: expected a transformers.Trainer, got int"):
        stray.attach(3)


def test_an_error_in_the_training_leaves_no_hook_after_close(tmp_path: Path) -> None:
    class Failing(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **options: Any) -> None:
            raise RuntimeError("stop")

    callback = TransformersCallback([utilization()])
    run = trainer(mixtral(), tmp_path, callback, Failing())
    with pytest.raises(RuntimeError, match="stop"):
        run.train()
    callback.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in run.model.modules())


def without_labels(number: int) -> list[dict[str, Tensor]]:
    return [{key: line[key] for key in ("input_ids", "attention_mask")} for line in lines(number)]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"analyses: expected callbacks such as SharpnessCallback.., got none"):
        TransformersCallback([])
    with pytest.raises(ValueError, match=r"analyses: expected callbacks such as .*, got Linear"):
        TransformersCallback([nn.Linear(1, 1)])
    with pytest.raises(ValueError, match="got two with the name 'sharpness'"):
        TransformersCallback([sharpness(), sharpness()])
    with pytest.raises(ValueError, match=r"expected weights='last' under a Trainer of transformers. With .*load_best"):
        TransformersCallback([sharpness(weights="best")])
    for name, splits, parts in (
        ("train", ["train"], {"train_dataset": without_labels(4)}),
        ("eval", ["test"], {"eval_dataset": without_labels(4)}),
    ):
        run = trainer(gpt2(), tmp_path, TransformersCallback(sharpness(splits=splits)), parts=parts)
        with pytest.raises(MisconfigurationException, match=f"{name}_dataset: expected batches with 'labels'"):
            run.train()
        assert run.state.global_step == 0
    run = trainer(gpt2(), tmp_path, TransformersCallback(sharpness(params=["nothing"])))
    with pytest.raises(ValueError, match="params: expected names of parameters or modules"):
        run.train()
    assert not any(module._forward_pre_hooks for module in run.model.modules())


def test_a_sharded_model_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curvature = sharpness()
    run = trainer(gpt2(), tmp_path, TransformersCallback(curvature))
    run.model.hf_device_map = {"transformer": 0, "lm_head": "cpu"}
    with pytest.warns(UserWarning, match="expected a model on one device, got one on 0, cpu. .* are left out"):
        run.train()
    assert not curvature.results and len(losses(run)) == 3
    for kind in ("FSDP", "DEEPSPEED"):
        monkeypatch.setattr(run.accelerator.state, "distributed_type", kind)
        assert f"one sharded by {kind}. Train with DistributedDataParallel" in str(reason_to_leave_out(run))


@pytest.mark.slow
def test_a_compiled_model(tmp_path: Path) -> None:
    found = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        experts, curvature = utilization(every_n_train_steps=1), sharpness(params=[NORM["mixtral"]])
        run = trainer(mixtral(), tmp_path, TransformersCallback([experts, curvature]), **options)
        run.train()
        counts = [stats.counts.tolist() for stats in experts.history_steps["model.layers.0.mlp"].values()]
        found.append((counts, losses(run), curvature.results["train"].eigenvalues))
    assert found[0] == found[1]


@pytest.mark.slow
def test_weights_and_biases(tmp_path: Path, wandb_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    experiment = wandb_run.experiment
    callback = TransformersCallback([sharpness()])
    trainer(gpt2(), tmp_path, callback, report_to=["wandb"]).train()
    logged = dict(experiment.summary)
    assert logged["train/sharpness/train/lambda_max"] == callback.metrics["sharpness/train/lambda_max"]
    assert {"train/sharpness/train/summary", "train/sharpness/train/spectrum"} <= set(logged)


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs["logits"][:, :-1].reshape(-1, VOCABULARY)
    return nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum") / num_items_in_batch


def on_rank(rank: int, folder: Path) -> Any:
    """Train on a rank under DistributedDataParallel of accelerate, with and without the callback."""
    ranks = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 0}
    os.environ.update({key: str(value) for key, value in ranks.items()}, MASTER_ADDR="127.0.0.1")
    curvature, experts = sharpness(params=[NORM["mixtral"]]), utilization(every_n_train_steps=1)
    runs = []
    for callbacks in ([TransformersCallback([curvature, experts])], []):
        # a loss that the Trainer scales for a mean over the processes
        options: dict[str, Any] = {"parts": {"compute_loss_func": summed}, "train_sampling_strategy": "sequential"}
        run = trainer(mixtral(), folder / str(rank), *callbacks, per_device_train_batch_size=2, **options)
        runs.append(run)
        runs[-1].train()
    assert_same_training(*runs)
    assert isinstance(runs[0].model_wrapped, nn.parallel.DistributedDataParallel)
    counts = [stats.counts for stats in experts.history_steps["model.layers.0.mlp"].values()]
    result = curvature.results["train"]
    logged = steps_of(runs[0], "sharpness/train/lambda_max")
    return runs[0].model.state_dict(), counts, result.eigenvalues, result.trace, logged


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    first, second = run_on_ranks(partial(on_rank, folder=tmp_path), tmp_path, leaves_traces=True)
    assert first[2:] == second[2:] and first[4] == [3]
    assert all(torch.equal(one, two) for one, two in zip(first[1], second[1], strict=True))
    # both processes together have the padded lines of a step
    tokens = [sum(int(line["attention_mask"].sum()) for line in lines()[start : start + 4]) for start in (0, 4, 8)]
    assert [int(counts.sum()) for counts in first[1]] == [2 * number for number in tokens]
    model = mixtral()
    model.load_state_dict(first[0])
    expected = plain(model, sample(lines(), 8, 4), params=[NORM["mixtral"]])
    assert first[2][0] == pytest.approx(expected.eigenvalues[0], rel=1e-4)


def test_timing_runs_as_in_training(tmp_path: Path) -> None:
    timing = InferenceTimingCallback(splits=["train"], batch_sizes=[2], num_runs=2, warmup_runs=1, on_error="raise")
    run = trainer(gpt2(), tmp_path, TransformersCallback(timing))
    run.train()
    assert timing.results["train"].metrics()
    assert timing.results["train"].requests.left_out == {"labels": "for the loss"}


def test_the_other_callbacks_need_no_transformers() -> None:
    # in a process of its own: modules that are imported again would stay in the attributes of their packages
    code = (
        # torchmetrics imports transformers where it is installed
        "import sys, lightning.pytorch, torchmetrics; sys.modules['transformers'] = None;"
        "import moe_heads.callbacks; print('imported'); import moe_heads.callbacks.hf"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout.strip() == "imported"
    assert ended.stderr.rstrip().splitlines()[-1].startswith("ImportError: ")
    assert "pip install 'moe-heads[hf]'" in ended.stderr

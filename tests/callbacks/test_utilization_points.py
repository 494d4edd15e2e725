"""Series of the expert utilization by global step: windows, their sums and what is logged."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from moe_heads import SparseMoE
from moe_heads.callbacks import ExpertUtilizationCallback, _utilization_points
from moe_heads.callbacks._utilization_points import add_window, packed_history, unpacked_history
from moe_heads.routing import RoutingStats
from tests.callbacks.test_distributed import FORKED, launch
from tests.support.lightning_models import PlainModule, loader, trainer

STEP, EPOCH = "expert_utilization/step/head", "expert_utilization/epoch/head"


class Oracle(Callback):
    """Counts the choices of each training batch by a hook of its own, one row after the other."""

    def __init__(self) -> None:
        self.counts: list[list[int]] = []
        self.num_passes = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PlainModule)
        pl_module.head.router.register_forward_hook(self.count)

    def on_train_batch_start(self, *args: Any) -> None:
        self.counts.append([0] * 4)

    def count(self, router: nn.Module, args: Any, routing: Any) -> None:
        self.num_passes += 1
        if router.training:
            for row in routing.indices.tolist():
                for expert in row:
                    self.counts[-1][expert] += 1

    def window(self, first: int, last: int) -> list[int]:
        return [sum(counts) for counts in zip(*self.counts[first:last], strict=True)]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randn(5, generator=generator), 1


def usage(n: int | None = 10, **options: Any) -> ExpertUtilizationCallback:
    return ExpertUtilizationCallback(every_n_train_steps=n, splits=["train"], stages=["test"], warn=False, **options)


def total(windows: dict[int, RoutingStats]) -> RoutingStats:
    first, *others = windows.values()
    return sum(others, start=first)


def assert_equal(found: RoutingStats, expected: RoutingStats) -> None:
    for name, value in vars(expected).items():
        exact = not value.is_floating_point()
        torch.testing.assert_close(getattr(found, name), value, rtol=0 if exact else 1e-12, atol=0)


def rows_of(folder: str) -> list[dict[str, str]]:
    with (Path(folder) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_ten_points_of_a_hundred_steps_add_up_to_the_epoch(tmp_path: Path) -> None:
    oracle, utilization, logger = Oracle(), usage(), CSVLogger(tmp_path)
    run = trainer(oracle, utilization, logger=logger, log_every_n_steps=50)
    run.fit(PlainModule(), loader(num_samples=400, batch_size=4))
    windows = utilization.history_steps["head"]
    assert list(windows) == list(range(10, 101, 10))
    for step, stats in windows.items():
        assert stats.counts.tolist() == oracle.window(step - 10, step)
        assert int(stats.num_rows) == 40
    assert_equal(total(windows), utilization.history["head"][0])
    rows = [row for row in rows_of(logger.log_dir) if row[f"{STEP}/load_cv"]]
    assert [int(row["step"]) for row in rows] == list(windows)
    for row, stats in zip(rows, windows.values(), strict=True):
        assert float(row[f"{STEP}/load_2"]) == pytest.approx(float(stats.load[2]))
    assert sum(bool(row[f"{EPOCH}/load_cv"]) for row in rows_of(logger.log_dir)) == 1
    # the same numbers, and at once for other callbacks
    keys = [
        {key.removeprefix(prefix) for key in run.callback_metrics if key.startswith(prefix)} for prefix in (STEP, EPOCH)
    ]
    # the weights are measured once in an epoch
    assert keys[0] == keys[1] - {"/num_inert_experts", "/weight_norm_min", "/stable_rank_min"}
    assert {"/num_dead_experts", "/router_gradient_norm", "/noise_agreement"} < keys[0]
    assert oracle.num_passes == 100  # no additional one


def test_an_endless_stream_that_stops_in_the_middle_of_a_window_reports_the_rest(tmp_path: Path) -> None:
    oracle, utilization, logger = Oracle(), usage(), CSVLogger(tmp_path)
    run = trainer(oracle, utilization, logger=logger, max_epochs=-1, max_steps=25)
    run.fit(PlainModule(), DataLoader(Stream(), 4))
    assert list(utilization.history_steps["head"]) == [10, 20, 25]
    assert utilization.history_steps["head"][25].counts.tolist() == oracle.window(20, 25)
    assert_equal(total(utilization.history_steps["head"]), utilization.history["head"][0])
    assert [int(row["step"]) for row in rows_of(logger.log_dir) if row[f"{STEP}/load_cv"]] == [10, 20, 25]


def test_windows_end_with_their_epoch_and_count_steps_of_accumulated_batches() -> None:
    oracle, utilization = Oracle(), usage(3)
    run = trainer(oracle, utilization, max_epochs=2, accumulate_grad_batches=2)
    run.fit(PlainModule(), loader(batch_size=4))  # ten batches and five steps an epoch
    windows = utilization.history_steps["head"]
    assert {step: stats.counts.tolist() for step, stats in windows.items()} == {
        step: oracle.window(2 * first, 2 * step) for first, step in ((0, 3), (3, 5), (5, 6), (6, 9), (9, 10))
    }
    for epoch, steps in enumerate([(3, 5), (6, 9, 10)]):
        assert_equal(total({step: windows[step] for step in steps}), utilization.history["head"][epoch])


def test_batches_after_the_last_step_of_an_epoch_belong_to_its_last_window(tmp_path: Path) -> None:
    class ByHand(PlainModule):
        """Steps in the first two of three batches."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer = self.optimizers()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            if batch_idx < 2:
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    utilization, logger = usage(2), CSVLogger(tmp_path)
    trainer(utilization, logger=logger).fit(ByHand(), loader())
    assert list(utilization.history_steps["head"]) == [2]
    assert_equal(utilization.history_steps["head"][2], utilization.history["head"][0])
    assert [row["step"] for row in rows_of(logger.log_dir) if row[f"{STEP}/load_cv"]] == ["2"]  # one point a step


def test_validations_in_between_are_not_counted_and_give_flips_to_the_next_point() -> None:
    class Turned(PlainModule):
        """Turns its gate round before the fifth batch: every validation sample changes its expert once."""

        def __init__(self) -> None:
            super().__init__()
            self.head = SparseMoE(5, 3, num_experts=2, k=1, expert_width=4, noisy=False, balance={})
            self.body = nn.Sequential(nn.Identity())

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                for parameter in self.head.router.gate.parameters():
                    parameter.data.neg_()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    flips: dict[int, float | None] = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            value = trainer.callback_metrics.pop(f"{STEP}/routing_flips", None)
            flips[trainer.global_step] = None if value is None else float(value)

    utilization = usage(1)
    run = trainer(utilization, Look(), val_check_interval=2, num_sanity_val_steps=2)
    run.fit(Turned(), loader(num_samples=32, batch_size=4), loader(num_samples=12, seed=1))
    # validations after the batches 2, 4, 6 and 8
    assert flips == {1: None, 2: None, 3: None, 4: None, 5: 0.0, 6: None, 7: 1.0, 8: None}
    assert {int(stats.num_rows) for stats in utilization.history_steps["head"].values()} == {4}


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:You're resuming from a checkpoint")
def test_a_resumed_fit_goes_on_with_the_series(tmp_path: Path) -> None:
    def fit(max_steps: int, ckpt_path: str | None = None) -> ExpertUtilizationCallback:
        utilization = usage(4)
        saving = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1, filename="{step}")
        run = trainer(utilization, saving, enable_checkpointing=True, max_steps=max_steps, max_epochs=-1)
        run.fit(PlainModule(), loader(num_samples=400, batch_size=4), ckpt_path=ckpt_path)
        return utilization

    first = fit(9)
    assert list(first.history_steps["head"]) == [4, 8, 9]
    again = fit(13, str(tmp_path / "step=6.ckpt"))
    windows = again.history_steps["head"]
    assert list(windows) == [4, 8, 12, 13]
    assert_equal(windows[4], first.history_steps["head"][4])
    assert int(windows[8].num_rows) == 4 * 2  # since it was resumed
    torch.load(tmp_path / "step=6.ckpt", weights_only=True)


def stats_of(*counts: int) -> RoutingStats:
    gates = torch.tensor(counts, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    rows = torch.tensor(sum(counts))
    return RoutingStats(torch.tensor(counts), gates, gates, zero, zero, rows, rows, rows)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=60), st.integers(1, 7))
def test_windows_stay_few_cover_all_steps_and_keep_the_sum(steps: list[tuple[int, int]], limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_utilization_points, "MAX_WINDOWS", limit)
        windows: dict[int, RoutingStats] = {}
        at = 0
        sums: dict[int, int] = {}
        for advance, count in steps:
            at += advance
            add_window(windows, at, stats_of(count, 1))
            sums[at] = sums.get(at, 0) + count
            assert len(windows) <= limit
            ends = sorted(windows)
            assert ends[-1] == at
            for first, last in zip([-1, *ends], ends, strict=False):
                expected = sum(number for step, number in sums.items() if first < step <= last)
                assert int(windows[last].counts[0]) == expected


def test_what_is_packed_is_unpacked() -> None:
    epochs, windows = {"head": {0: stats_of(1, 2)}}, {"head": {10: stats_of(3, 4), 15: stats_of(5, 6)}, "b": {}}
    windows["b"][15] = stats_of(7, 8, 9)
    found = unpacked_history(packed_history(epochs, windows))
    for before, after in zip((epochs, windows), found, strict=True):
        assert {head: list(own) for head, own in before.items()} == {head: list(own) for head, own in after.items()}
        for head, own in before.items():
            for at, stats in own.items():
                assert_equal(after[head][at], stats)
    assert packed_history({}, {}) == {}


def test_a_model_without_a_router_writes_nothing(tmp_path: Path) -> None:
    module, logger = PlainModule(), CSVLogger(tmp_path)
    module.head = nn.Linear(8, 3)
    trainer(usage(1), logger=logger).fit(module, loader())
    assert not [key for row in rows_of(logger.log_dir) for key in row if key.startswith("expert_utilization")]


class OftenWithout(PlainModule):
    """On rank one, only the last of eight batches reaches the router."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        without = self.global_rank == 1 and batch_idx < 7
        output = self.body(batch[0]) if without else self(batch[0])
        return output.square().mean()


class Write(Callback):
    """Writes what each rank found, since the processes end with the fit."""

    def __init__(self, utilization: ExpertUtilizationCallback) -> None:
        self.utilization = utilization

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        windows, epochs = self.utilization.history_steps["head"], self.utilization.history["head"]
        found = {
            "windows": {step: stats.num_rows.item() for step, stats in windows.items()},
            "epoch": epochs[0].num_rows.item(),
            "metrics": {n: float(v) for n, v in sorted(trainer.callback_metrics.items()) if "/step/" in n},
        }
        Path(f"found{trainer.global_rank}.json").write_text(json.dumps(found))


def test_ranks_without_a_pass_in_a_window_report_with_the_others(tmp_path: Path) -> None:
    process = launch(
        tmp_path,
        f"""
from tests.callbacks.test_utilization_points import OftenWithout, Write, usage

utilization = usage(3)
trainer = Trainer(
    accelerator="cpu",
    devices=2,
    strategy={FORKED[:-1]}, find_unused_parameters=True),
    max_epochs=1,
    callbacks=[utilization, Write(utilization)],
    logger=CSVLogger("logs", version=0),
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    log_every_n_steps=1,
)
torch.manual_seed(0)
trainer.fit(OftenWithout(), loader(num_samples=32, batch_size=2))
""",
    )
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    first, second = (json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in range(2))
    assert first["windows"] == {"3": 6, "6": 6, "8": 6}  # two rows of each batch, and of rank one in the last only
    assert first["epoch"] == 18
    assert first == second
    assert first["metrics"][f"{STEP}/load_cv"] >= 0
    rows = rows_of(str(tmp_path / "logs" / "lightning_logs" / "version_0"))
    steps = [row["step"] for row in rows if row[f"{STEP}/load_cv"]]
    assert steps == ["3", "6", "8"]


def test_a_checkpoint_of_before_there_were_windows_is_restored() -> None:
    stats = SparseMoE(4, 3, num_experts=4)(torch.randn(20, 4), return_routing=True).routing.stats()
    before = {name: value for name, value in vars(stats).items() if name != "num_dropped_choices"}
    epochs, steps = unpacked_history({"head": {0: before}})
    assert steps == {} and torch.equal(epochs["head"][0].counts, stats.counts)
    assert int(epochs["head"][0].num_dropped_choices) == 0

import json
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads import Dense, SoftMoE, SparseMoE
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis.inference_timing.function import inference_timing
from moe_heads.analysis.inference_timing.sweep import Sweep
from tests.support.hand_routers import HandHead
from tests.support.untouched import untouched


class Slow(nn.Module):
    """Sleeps a while for each sample."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds * len(x))
        return x


class Pair(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


QUICK = {"num_runs": 3, "warmup_runs": 0}


def sparse_pair() -> Pair:
    return Pair(nn.Linear(3, 16), SparseMoE(16, 4, num_experts=4, expert_width=8, dispatch="ragged"))


def test_known_latencies_are_found_for_the_whole_and_its_parts() -> None:
    model = Pair(Slow(0.004), Slow(0.001))
    timing = inference_timing(model, torch.zeros(2, 3), batch_sizes=(1, 5), num_runs=5, warmup_runs=1)
    rows = {(row.module, row.batch_size): row for row in timing.rows}
    assert list(rows) == [(m, b) for b in (1, 5) for m in ("model", "backbone", "head")]
    # sleeping takes at least the given time, and an unknown overhead
    for (module, size), row in rows.items():
        least = size * {"model": 5.0, "backbone": 4.0, "head": 1.0}[module]
        assert least <= row.p50_ms <= row.p90_ms <= row.p99_ms <= row.max_ms
        assert row.samples_per_s == pytest.approx(1000 * size / row.mean_ms)
        assert (row.num_runs, row.warmup_runs, row.mode) == (5, 1, "eager")
        assert row.device_p50_ms is row.peak_memory is None
    assert rows["head", 5].p50_ms < rows["backbone", 5].p50_ms


def test_percentiles_keep_the_outlier(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [float(t) for t in (*range(1, 100), 5000)]
    model = nn.Identity()

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        return batch

    # the limits of the machine are read by the same clock
    monkeypatch.setattr(Sweep, "_limits_of", lambda *_: None)
    options = {"batch_sizes": [4], "num_runs": 100, "warmup_runs": 0, "seconds_per_size": 99}
    # after each run, the constant cost is read twice, which is nothing here
    clock = iter([instant for t in times for instant in (0, int(t * 1e6), 0, 0, 0, 0)])
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(clock))
    (row,) = inference_timing(model, torch.zeros(1), forward_fn=forward, **options).rows
    assert row.p50_ms == pytest.approx(50.5)
    assert row.p90_ms == pytest.approx(90.1)
    assert row.p99_ms == pytest.approx(99 + 0.01 * (5000 - 99))
    assert row.max_ms == pytest.approx(5000)
    assert row.mean_ms == pytest.approx(sum(times) / 100)
    assert row.std_ms == pytest.approx(torch.tensor(times).std().item(), rel=1e-5)
    assert row.samples_per_s == pytest.approx(4 * 100 / sum(times) * 1000)
    assert row.p50_low_ms < 50.5 < row.p50_high_ms


def test_modules_run_on_the_inputs_they_had_in_evaluation_and_inference_mode() -> None:
    seen = []

    class Watching(nn.Module):
        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            seen.append((x.clone(), scale.clone(), self.training, torch.is_inference_mode_enabled()))
            return x * scale

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Watching()

        def forward(self, x: Tensor) -> Tensor:
            hidden = x + 1
            out = self.part(hidden, scale=torch.tensor(2.0))
            hidden.zero_()  # work in place after the call must not reach the captured input
            return out

    inference_timing(Model(), torch.arange(3.0), batch_sizes=[5], modules=["part"], **QUICK)
    # to capture and count, and three times in the rounds: in the model and alone
    assert [inference for *_, inference in seen] == [True] * 7
    for x, scale, training, _ in seen:
        assert x.tolist() == [1, 2, 3, 1, 2]
        assert scale.item() == 2
        assert not training


class Writing(nn.Module):
    """Writes into its input, and keeps a state from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.state = nn.ReLU(inplace=True), None

    def forward(self, x: Tensor) -> Tensor:
        x -= 1.0
        self.state = x.clone() if self.state is None else self.state.mul_(0.9).add_(x.mean())
        return self.inner(x)


def test_a_model_that_writes_into_its_input_gets_its_original_input_in_each_run() -> None:
    model, x = Writing(), torch.tensor([1.0, float("nan"), 3.0])
    seen, inner = [], []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    model.inner.register_forward_pre_hook(lambda _, args: inner.append(args[0].tolist()))
    modes = ["eager", "bf16"]
    timing = inference_timing(model, x, batch_sizes=[3], modules=["inner"], modes=modes, **QUICK)
    assert len(timing.rows) == 4
    assert {str(values) for values in seen} == {"[1.0, nan, 3.0]"}
    assert {str(values) for values in inner} == {"[0.0, nan, 2.0]"}
    assert x[[0, 2]].tolist() == [1, 3]
    first = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 2))
    assert inference_timing(first, torch.randn(4, 8), batch_sizes=[2], **QUICK).rows[0].flops == 2 * 2 * 8 * 2


def test_a_function_may_take_entries_out_of_its_batch() -> None:
    batch = {"x": torch.randn(2, 3), "labels": [torch.zeros(2)]}

    def forward(model: nn.Module, batch: dict) -> object:
        batch["labels"].pop()
        return model(batch.pop("x"))

    timing = inference_timing(nn.Linear(3, 2), batch, batch_sizes=[1, 2], forward_fn=forward, **QUICK)
    assert [row.num_runs for row in timing.rows] == [3, 3]
    assert list(batch) == ["x", "labels"]


def test_default_modules_are_backbone_head_owners_of_a_router_and_routers() -> None:
    def modules(model: nn.Module, x: Tensor) -> list[str]:
        return [row.module for row in inference_timing(model, x, batch_sizes=[2], **QUICK).rows]

    assert modules(Pair(nn.Linear(3, 4), Dense(4, 2)), torch.randn(1, 3)) == ["model", "backbone", "head"]
    body = nn.Sequential(nn.Linear(3, 4), SoftMoE(4, 2, num_experts=2, expert_width=2))
    assert modules(body, torch.randn(1, 3)) == ["model", "1", "1.router", "1_dense"]
    wrapper = nn.Sequential()
    wrapper.add_module("model", HandHead(3))
    assert modules(wrapper, torch.randn(1, 3))[:2] == ["model", "model.model"]
    idle = Pair(nn.Linear(3, 4), Dense(4, 2))
    idle.auxiliary = HandHead(4)
    assert modules(idle, torch.randn(1, 3)) == ["model", "backbone", "head"]


def test_a_sparse_head_is_divided_and_compared_with_its_dense_twin() -> None:
    timing = inference_timing(sparse_pair(), torch.randn(5, 3), batch_sizes=[1, 8], num_runs=12, warmup_runs=1)
    stages = ["head.router", "head.dispatch", "head.combine"]
    assert [row.module for row in timing.rows if row.batch_size == 8] == [
        *("model", "backbone", "head"),
        *stages,
        "head_dense",
    ]
    parts = {(part.whole, part.name): part for part in timing.parts if part.batch_size == 8}
    assert [name for whole, name in parts if whole == "model"] == ["backbone", "head", "rest"]
    assert [name for whole, name in parts if whole == "head"] == ["router", "dispatch", "combine", "experts"]
    head = next(row for row in timing.rows if (row.module, row.batch_size) == ("head", 8))
    assert sum(part.ms for (whole, _), part in parts.items() if whole == "head") == pytest.approx(head.p50_ms)
    (gap,) = timing.gaps
    twin = next(row for row in timing.rows if (row.module, row.batch_size) == ("head_dense", 8))
    point = gap.points[1]
    assert point.realized == pytest.approx(twin.p50_ms / head.p50_ms)
    assert point.low <= point.realized <= point.high
    assert point.theoretical == pytest.approx(twin.flops / head.flops)
    assert head.flops == sparse_pair().head.flops(8).active
    assert point.bound == pytest.approx(point.dense_bound.ms / point.head_bound.ms)
    assert gap.dense_parameters == pytest.approx(gap.parameters, rel=0.05)


def test_flops_of_the_model_count_the_chosen_experts_whatever_runs() -> None:
    for dispatch in ("all", "ragged"):
        model = sparse_pair()
        model.head.dispatch = dispatch
        rows = inference_timing(model, torch.randn(5, 3), batch_sizes=[2, 4], **QUICK).rows
        flops = {(row.module, row.batch_size): row.flops for row in rows}
        for size in (2, 4):
            assert flops["backbone", size] == 2 * size * 3 * 16
            assert flops["model", size] == flops["backbone", size] + model.head.flops(size).active


def test_only_what_counts_the_samples_is_repeated() -> None:
    shapes = []

    def forward(model: nn.Module, batch: dict) -> None:
        shapes.append({key: tuple(value.shape) for key, value in batch.items() if isinstance(value, Tensor)})

    batch = {"x": torch.zeros(3, 2), "y": torch.zeros(3), "vocabulary": torch.zeros(7), "scale": torch.ones(()), "n": 1}
    inference_timing(nn.Identity(), batch, batch_sizes=[4], forward_fn=forward, **QUICK)
    assert shapes[0] == {"x": (4, 2), "y": (4,), "vocabulary": (7,), "scale": ()}


def test_environment_is_that_of_the_caller() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        timing = inference_timing(nn.Linear(2, 2), torch.zeros(1, 2), batch_sizes=[1], **QUICK)
    environment = timing.environment
    assert (environment.device_type, environment.dtype, environment.autocast) == ("cpu", "float32", "bfloat16")
    assert environment.num_threads == torch.get_num_threads()
    assert environment.torch_version == torch.__version__
    assert timing.load_average_end is not None
    assert timing.peak_flops > 0


def test_modes_are_rows_and_unavailable_ones_are_named() -> None:
    modes = ["eager", "bf16", "channels_last", "cuda_graph"]
    timing = inference_timing(sparse_pair(), torch.randn(2, 3), batch_sizes=[2], modes=modes, **QUICK)
    keys = {(row.module, row.mode) for row in timing.rows}
    assert {("head", "eager"), ("head", "bf16")} <= keys
    # stages of a head run in eager mode only
    assert {mode for module, mode in keys if module.startswith("head.")} == {"eager"}
    reasons = {(skip.mode, skip.module): skip.reason for skip in timing.skipped}
    assert reasons["cuda_graph", "model"] == "needs a CUDA device; the model is on cpu"
    assert reasons["channels_last", "head"] == "needs a 4-D input; the module has none"
    assert {gap.mode for gap in timing.gaps} == {"eager", "bf16"}
    assert "head/batch2/bf16/p50_ms" in timing.metrics()


def test_a_mode_that_fails_costs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", broken)
    model = Pair(nn.Linear(3, 4), Dense(4, 2))
    timing = inference_timing(model, torch.randn(2, 3), batch_sizes=[2], modes=["compiled", "eager"], **QUICK)
    assert {row.mode for row in timing.rows} == {"eager"}
    assert {(skip.module, skip.reason) for skip in timing.skipped} == {
        (name, "RuntimeError: no compiler") for name in ("model", "backbone", "head")
    }


def test_a_mode_that_fails_in_its_first_run_costs_nothing_else() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(len(x), -1)  # impossible for a tensor in channels_last

    class NoBf16(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(self.linear(x).numpy())  # which lacks bf16

    for model, x, mode in ((Views(), torch.randn(2, 3, 4, 4), "channels_last"), (NoBf16(), torch.randn(2, 3), "bf16")):
        timing = inference_timing(model, x, batch_sizes=[2], modes=[mode, "eager"], **QUICK)
        assert [row.mode for row in timing.rows] == ["eager"]
        (skip,) = timing.skipped
        assert (skip.mode, skip.module) == (mode, "model")
        assert "Error" in skip.reason


def test_the_model_is_untouched_also_after_an_error_and_ctrl_c() -> None:
    model = Pair(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True)), Dense(4, 2))
    good, too_wide = torch.randn(2, 3), torch.randn(2, 9)
    with untouched(model):
        inference_timing(model, good, batch_sizes=[2], modes=["eager", "bf16"], **QUICK)
    with untouched(model), pytest.raises(ValueError, match=r"example_batch: .* RuntimeError: .*shapes"):
        inference_timing(model, too_wide, batch_sizes=[2], **QUICK)
    sparse = sparse_pair()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with untouched(sparse), pytest.raises(KeyboardInterrupt):
        inference_timing(sparse, good, batch_sizes=[2], progress=Progress(show=interrupt), **QUICK)


def test_progress_goes_from_round_to_round_to_the_end() -> None:
    steps: list[tuple[int, int]] = []
    progress = Progress(show=lambda *step: steps.append(step[:2]))
    inference_timing(nn.Identity(), torch.zeros(1), batch_sizes=[1, 2], num_runs=2, warmup_runs=1, progress=progress)
    assert steps == [(49, 200), (100, 200), (149, 200), (200, 200)]


def test_the_sizes_that_were_finished_in_time_are_the_result() -> None:
    progress = Progress(max_time=0.3)
    timing = inference_timing(
        Slow(0.05), torch.zeros(1), batch_sizes=[1, 4], num_runs=2, warmup_runs=0, progress=progress
    )
    assert {row.batch_size for row in timing.rows} == {1}
    assert timing.partial == "max_time = 0.3 s was over"


def test_everything_is_in_the_json() -> None:
    timing = inference_timing(sparse_pair(), torch.randn(5, 3), batch_sizes=[1], **QUICK)
    found = json.loads(timing.to_json())
    assert [row["module"] for row in found["rows"]] == [row.module for row in timing.rows]
    assert found["rows"][0]["p50_high_ms"] is None  # three runs have no interval
    assert found["gaps"][0]["points"][0]["theoretical"] == timing.gaps[0].points[0].theoretical
    assert found["environment"]["torch_version"] == torch.__version__
    assert found["is_noisy"] is False  # unknown after three runs
    assert found["drift_allowance"] == 0.02
    assert "sampling" not in found["allowance_for_drift_between_runs"]
    assert "p50_low_ms" in found["interval_of_the_sampling"]
    assert "multiply-add" in found["flops_convention"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed: expected an int from 0 to .* got -1"),
        ({"batch_sizes": [0]}, r"batch_sizes\[0\]: expected an integer of at least 1, got 0"),
        ({"example_batch": torch.zeros(0, 3)}, "example_batch: expected at least one sample, got none"),
        ({"example_batch": torch.zeros(2, 4)}, "example_batch: .* accepts, got one that raises Runt"),
        ({"modules": ["neck"]}, r"modules: expected names of modules, such as 'backbone', got \['neck'\]"),
        ({"modules": ["spare"]}, r"modules: expected modules that run in the forward pass, got \['spare'\]"),
    ],
)
def test_bad_input(options: dict, message: str) -> None:
    model = Pair(nn.Linear(3, 3), nn.Linear(3, 3))
    model.spare = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=message):
        inference_timing(model, **({"example_batch": torch.zeros(2, 3)} | options))


@pytest.mark.slow
def test_two_runs_of_one_model_differ_by_no_more_than_their_intervals_and_the_allowance() -> None:
    model, apart, num_pairs = Pair(nn.Linear(64, 64), nn.Linear(64, 8)), 0, 0
    for _ in range(20):
        first, second = (
            inference_timing(model, torch.randn(8, 64), batch_sizes=[8, 64], seconds_per_size=0.3) for _ in range(2)
        )
        for a, b in zip(first.rows, second.rows, strict=True):
            num_pairs += 1
            apart += not a.agrees_with(b, first.drift_allowance)
    print(f"{apart} of {num_pairs} pairs apart")
    assert apart <= 0.05 * num_pairs

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_heads import Dense, SoftMoE, SparseMoE
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis.inference_timing.function import inference_timing
from moe_heads.analysis.inference_timing.result import InferenceTimingResult
from moe_heads.analysis.inference_timing.rows import TimingRow
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
SHORT = {"num_runs": 7, "warmup_runs": 1}


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
    clock = iter([instant for t in times for instant in (0, int(t * 1e6))])
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(clock))
    (row,) = inference_timing(model, torch.zeros(1), forward_fn=forward, **options).rows
    assert row.p50_ms == pytest.approx(50.5)
    assert row.p90_ms == pytest.approx(90.1)
    assert row.p99_ms == pytest.approx(99 + 0.01 * (5000 - 99))
    assert row.max_ms == 5000
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


def sparse(dispatch: str = "ragged") -> SparseMoE:
    return SparseMoE(16, 4, num_experts=4, expert_width=8, dispatch=dispatch)


def rows_of(timing: InferenceTimingResult) -> dict[tuple[str, int], TimingRow]:
    return {(row.module, row.batch_size): row for row in timing.rows}


def test_fused_attention_and_recurrent_layers_are_counted_in_the_rows() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), nn.LSTM(16, 8, batch_first=True))
    rows = rows_of(inference_timing(model, torch.randn(2, 5, 16), batch_sizes=[1, 3], modules=["0", "1"], **SHORT))
    encoder, lstm = 2 * 5 * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 5 * 5 * 16, 2 * 5 * 4 * 8 * (16 + 8)
    for size in (1, 3):
        assert rows["0", size].flops == size * encoder
        assert rows["1", size].flops == size * lstm
        assert rows["model", size].flops == size * (encoder + lstm)
        assert all(rows[name, size].flops_complete for name in ("model", "0", "1"))
        assert rows["model", size].peak_share > 0


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.fft.fft(x).real)


def test_what_cannot_be_counted_leaves_a_lower_bound_and_no_share_of_peak() -> None:
    model = nn.Sequential(Spectral(), nn.Linear(16, 16), sparse())
    timing = inference_timing(model, torch.randn(2, 16), batch_sizes=[2], modules=["0", "1", "2"], **SHORT)
    rows = rows_of(timing)
    assert [rows[name, 2].flops_complete for name in ("model", "0", "1", "2")] == [False, False, True, True]
    assert rows["0", 2].flops == 2 * 2 * 16 * 16
    assert rows["model", 2].peak_share is rows["0", 2].peak_share is None
    assert rows["1", 2].peak_share > 0
    assert timing.uncounted["aten._fft_r2c"] == 1
    assert "≥ " in timing.summary()


class SpectralHead(SparseMoE):
    """A head whose products are not all known; its formula omits the transform."""

    def classify(self, x: Tensor) -> Any:
        return super().classify(torch.fft.fft(x).real)


def test_of_operators_that_are_not_known_there_is_no_bound() -> None:
    model = nn.Sequential(SpectralHead(16, 4, num_experts=4, expert_width=8))
    (point,) = inference_timing(model, torch.randn(2, 16), batch_sizes=[2], **SHORT).gaps[0].points
    assert point.realized > 0
    assert point.bound is point.dense_bound is point.head_bound is None


class Gallery(nn.Module):
    """Encodes the same gallery whatever the batch, and compares all samples with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.gallery = nn.Linear(16, 16), nn.Parameter(torch.randn(10, 16))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.encoder(self.gallery).t()).sum() + (x @ x.t()).sum()


def test_flops_are_those_of_each_size_in_whatever_proportion() -> None:
    rows = rows_of(inference_timing(Gallery(), torch.randn(2, 16), batch_sizes=[1, 4, 8], **SHORT))
    for size in (1, 4, 8):
        assert rows["model", size].flops == 2 * 16 * (10 * 16 + 10 * size + size * size)


def test_operators_that_cannot_be_recorded_cost_only_the_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    class FailsUnderModes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                raise NotImplementedError("no rule for this mode")
            return self.inner(x)

        def __init__(self) -> None:
            super().__init__()
            self.inner = sparse()

    timing = inference_timing(FailsUnderModes(), torch.randn(2, 16), batch_sizes=[2], **SHORT)
    rows = rows_of(timing)
    assert rows["model", 2].flops is None
    assert rows["inner", 2].flops == sparse().flops(2).active
    assert timing.gaps[0].points[0].bound is None
    reason = "FLOPs: its operators cannot be recorded, NotImplementedError: no rule for this mode"
    assert [skip.reason for skip in timing.skipped] == [reason]


class Twice(nn.Module):
    """Calls backbone and head twice in a forward pass, the second time on half of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(16, 16), sparse()

    def forward(self, x: Tensor) -> Tensor:
        whole, half = (self.head(self.backbone(part)) for part in (x, x[: len(x) // 2]))
        return whole.sum() + half.sum()


def test_a_module_that_is_called_twice_is_timed_and_counted_twice() -> None:
    model, x, seen = Twice(), torch.randn(4, 16), []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with untouched(model):
        timing = inference_timing(model, x, batch_sizes=[4], modes=["eager", "bf16"], num_runs=7, warmup_runs=0)
    rows = {row.module: row for row in timing.rows if row.mode == "eager"}
    assert rows["backbone"].flops == 2 * (4 + 2) * 16 * 16
    head = sparse()
    assert rows["head"].flops == head.flops(4).active + head.flops(2).active
    assert rows["model"].flops == rows["backbone"].flops + rows["head"].flops
    # no run of the backbone is without its second call
    assert seen == [4, 2] * (len(seen) // 2)
    assert {part.name for part in timing.parts if part.whole == "head"} >= {"router", "experts"}
    (gap, _) = timing.gaps
    twin = rows["head_dense"]
    assert gap.points[0].theoretical == twin.flops / rows["head"].flops
    assert gap.points[0].realized == pytest.approx(twin.p50_ms / rows["head"].p50_ms)


@pytest.mark.parametrize("batch", [torch.randn(3, 16), {"x": torch.randn(3, 16)}])
def test_a_head_that_is_the_whole_model_has_parts_and_a_gap(batch: object) -> None:
    head = sparse()
    timing = inference_timing(head, batch, batch_sizes=[2], **SHORT)
    rows = rows_of(timing)
    assert [name for name, _ in rows] == ["model", "router", "dispatch", "combine", "model_dense"]
    assert rows["model", 2].flops == head.flops(2).active
    assert [part.name for part in timing.parts] == ["router", "dispatch", "combine", "experts"]
    (gap,) = timing.gaps
    assert gap.head == "model"
    assert gap.points[0].theoretical == rows["model_dense", 2].flops / rows["model", 2].flops
    assert gap.points[0].bound > 0


def test_a_function_that_fails_with_a_dense_head_costs_only_the_gap() -> None:
    timing = inference_timing(
        sparse(), torch.randn(3, 16), batch_sizes=[2], forward_fn=lambda head, x: (head(x), head.router(x)), **SHORT
    )
    assert [row.module for row in timing.rows] == ["model", "router", "dispatch", "combine"]
    assert timing.gaps == ()
    (skip,) = timing.skipped
    assert (skip.module, skip.reason) == ("model_dense", "AttributeError: 'Dense' object has no attribute 'router'")


def test_without_modules_a_head_is_timed_alone_and_counts_what_it_chooses() -> None:
    for model in (sparse("all"), nn.Sequential(nn.Identity(), sparse("all"))):
        timing = inference_timing(model, torch.randn(3, 16), batch_sizes=[2], modules=[], **SHORT)
        (row,) = timing.rows
        assert row.flops == sparse().flops(2).active
        assert timing.gaps == timing.parts == ()


def test_a_module_called_as_the_dense_twin_keeps_its_rows() -> None:
    model = nn.Sequential()
    model.add_module("head_dense", nn.Linear(16, 16))
    model.add_module("head", sparse())
    timing = inference_timing(model, torch.randn(2, 16), batch_sizes=[2], modules=["head_dense", "head"], **SHORT)
    rows = rows_of(timing)
    assert rows["head_dense", 2].flops == 2 * 2 * 16 * 16
    assert rows["head_dense_", 2].flops > rows["head_dense", 2].flops
    assert timing.gaps[0].points[0].theoretical == rows["head_dense_", 2].flops / rows["head", 2].flops


def test_a_module_called_model_is_in_the_figures_with_its_head() -> None:
    inner, outer = nn.Sequential(), nn.Sequential()
    inner.add_module("head", sparse())
    outer.add_module("model", inner)
    timing = inference_timing(outer, torch.randn(2, 16), batch_sizes=[1, 2], modules=["model", "model.head"], **SHORT)
    labels = {line.get_label().split(",")[0] for line in timing.plot()[1].get_lines()}
    assert {"model", "model.model", "model.model.head"} <= labels
    assert "model.model.head.dispatch" not in labels


def test_without_eager_there_is_a_gap_and_the_missing_parts_are_named() -> None:
    model = nn.Sequential(nn.Linear(16, 16), sparse())
    timing = inference_timing(model, torch.randn(2, 16), batch_sizes=[1, 2], modes=["bf16"], **SHORT)
    (gap,) = timing.gaps
    assert (gap.mode, len(gap.points)) == ("bf16", 2)
    assert timing.plot_gap() is not None
    assert timing.parts == ()
    reasons = [skip.reason for skip in timing.skipped]
    assert reasons == ["no split and no roofline, because both require the mode eager"]


def test_the_json_holds_the_plan_and_what_was_left_out() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Dense(16, 4))
    timing = inference_timing(model, torch.randn(2, 16), batch_sizes=[2, 1], modes=["cuda_graph", "eager"], **SHORT)
    found = json.loads(timing.to_json())
    plan = {key: found["plan"][key] for key in ("batch_sizes", "modes", "num_runs", "seconds_per_size", "max_seconds")}
    assert plan == {
        "batch_sizes": [2, 1],
        "modes": ["cuda_graph", "eager"],
        "num_runs": 7,
        "seconds_per_size": 0.8,
        "max_seconds": 50.0,
    }
    assert {skip["batch_size"] for skip in found["skipped"]} == {1, 2}
    assert all("needs a CUDA device" in skip["reason"] for skip in found["skipped"])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model_is_timed_as_a_whole_and_says_why() -> None:
    model = nn.Sequential()
    model.add_module("backbone", nn.Linear(16, 16))
    scripted = torch.jit.script(model)
    timing = inference_timing(scripted, torch.randn(2, 16), batch_sizes=[2], **SHORT)
    assert [(row.module, row.flops) for row in timing.rows] == [("model", 2 * 2 * 16 * 16)]
    (skip,) = timing.skipped
    assert (skip.module, skip.reason) == ("backbone", "compiled by TorchScript, which hides the inputs of its modules")
    with pytest.raises(
        ValueError, match=r"modules: expected modules that TorchScript did not compile, got \['backbone'\]"
    ):
        inference_timing(scripted, torch.randn(2, 16), modules=["backbone"])


def on_cuda(test: Callable[[], None]) -> Callable[[], None]:
    needs = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(needs(test))


class Waiting(nn.Linear):
    """Keeps the device busy for some milliseconds: the launches are negligible."""

    def forward(self, x: Tensor) -> Tensor:
        torch.cuda._sleep(20_000_000)
        return super().forward(x)


@on_cuda
def test_device_time_is_apart_from_wall_time_and_memory_is_known() -> None:
    model = nn.Sequential(nn.Linear(64, 64), SparseMoE(64, 10)).cuda()
    timing = inference_timing(model, torch.randn(4, 64), batch_sizes=[4, 64], num_runs=50)
    for row in timing.rows:
        assert 0 < row.device_p50_ms <= row.p50_ms
        assert row.peak_memory > 0
    (row,) = inference_timing(Waiting(2, 2).cuda(), torch.zeros(1, 2), batch_sizes=[1]).rows
    assert row.device_p50_ms == pytest.approx(row.p50_ms, rel=0.05)


@on_cuda
def test_the_device_time_agrees_with_triton_within_five_percent() -> None:
    testing = pytest.importorskip("triton.testing", reason="needs triton")
    module, x = nn.Linear(4096, 4096).cuda(), torch.randn(2048, 4096, device="cuda")
    (row,) = inference_timing(module, x, batch_sizes=[len(x)]).rows
    with torch.inference_mode():
        theirs = testing.do_bench(lambda: module(x), return_mode="median")
    assert row.device_p50_ms == pytest.approx(theirs, rel=0.05)


@on_cuda
def test_a_cuda_graph_is_a_row_and_no_slower_than_the_launches_that_it_saves() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(50))).cuda()
    timing = inference_timing(model, torch.randn(1, 64), batch_sizes=[1], modes=["eager", "cuda_graph"], modules=[])
    rows = {row.mode: row for row in timing.rows}
    assert timing.skipped == ()
    assert rows["cuda_graph"].p50_ms < rows["eager"].p50_ms


class Hungry(nn.Module):
    """Allocates a terabyte from four samples on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) >= 4:
            torch.empty(2**40, dtype=torch.uint8, device=x.device)
        return x * self.weight


@on_cuda
def test_a_size_that_memory_does_not_hold_is_named_and_the_sweep_goes_on() -> None:
    timing = inference_timing(Hungry().cuda(), torch.zeros(1, 4), batch_sizes=[1, 4, 2], num_runs=5)
    assert [row.batch_size for row in timing.rows] == [1, 2]
    (skip,) = timing.skipped
    assert skip.batch_size == 4
    assert skip.reason.startswith("out of memory: OutOfMemoryError: CUDA out of memory.")

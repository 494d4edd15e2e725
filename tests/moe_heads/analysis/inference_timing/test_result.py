from dataclasses import replace

import torch
from torch import nn

from moe_heads.analysis._shared.environment import environment_of
from moe_heads.analysis.inference_timing.limits import Bound
from moe_heads.analysis.inference_timing.result import InferenceTimingResult
from moe_heads.analysis.inference_timing.rows import Skipped, TimingRow
from moe_heads.analysis.inference_timing.speedup import Gap, GapPoint
from moe_heads.analysis.inference_timing.stages import Part


def row(module: str, size: int, p50: float, **options: object) -> TimingRow:
    known = {"max_ms": 5 * p50, "p50_low_ms": 0.99 * p50, "p50_high_ms": 1.01 * p50, **options}
    numbers = (p50, 2 * p50, 4 * p50, 1.5 * p50, 0.1, 50, 1000 * size / (1.5 * p50))
    return TimingRow(size, "eager", module, *numbers, **known)


def timing() -> InferenceTimingResult:
    rows = row("model", 1, 2.0), row("head", 1, 1.0), row("model", 32, 20.0), row("head", 32, 3.0)
    points = (
        GapPoint(1, "eager", 4.0, 0.5, 0.4, 0.6, 0.7, Bound(1.0, "memory"), Bound(1.4, "launches")),
        GapPoint(32, "eager", 4.0, 2.0, 1.9, 2.1, 3.0, Bound(3.0, "arithmetic"), Bound(1.0, "arithmetic")),
    )
    return InferenceTimingResult(
        rows,
        environment_of(nn.Linear(1, 1)),
        warmup_runs=10,
        seed=0,
        skipped=(
            Skipped(1, "cuda_graph", "model", "needs a CUDA device"),
            Skipped(32, "cuda_graph", "model", "needs a CUDA device"),
            Skipped(64, None, None, "out of memory"),
        ),
        parts=(
            Part(1, "head", "router", 0.25, 0.2, 0.3, "timed alone"),
            Part(1, "head", "experts", 0.75, 0.6, 0.9, "by difference"),
        ),
        gaps=(Gap("head", "eager", 1000, 1010, points, 5.657, 4.0, 8.0),),
        uncounted={"aten.relu": 2},
        peak_flops=1e11,
        load_average_end=0.25,
    )


def test_metrics_name_module_batch_size_and_gap() -> None:
    metrics = timing().metrics()
    assert len(metrics) == 16 + 2 * 2 + 1 + 3
    over_dense = {name: value for name, value in metrics.items() if name.endswith("_over_dense")}
    key = "head/batch1"
    assert over_dense == {
        f"{key}/router_over_dense": 0.5,
        f"{key}/experts_over_dense": 1.5,
        f"{key}/launches_over_dense": 0,
    }
    assert metrics["head/batch32/p50_ms"] == 3.0
    assert metrics["model/batch1/p99_ms"] == 8.0
    assert metrics["model/batch32/samples_per_s"] == 32000 / 30
    assert metrics["head/batch32/speedup"] == 2.0
    assert metrics["head/batch1/theoretical_speedup"] == 4.0
    assert metrics["head/break_even_batch"] == 5.657
    compiled = replace(timing(), rows=(replace(row("model", 1, 2.0), mode="compiled"),), gaps=())
    assert set(compiled.metrics()) == {
        f"model/batch1/compiled/{name}" for name in ("p50_ms", "p90_ms", "p99_ms", "samples_per_s")
    }
    assert replace(timing(), partial="stopped").metrics()["partial"] == 1


def test_summary_has_the_tables_what_was_left_out_and_the_environment() -> None:
    text = timing().summary()
    assert "| model | 32 | eager | 20 | 19.8 to 20.2 | 40 | 80 | 100 | 50 | 1,067 |" in text
    assert "faster than the dense head from a batch size of about 5.66 (4 to 8)." in text
    assert "| 95 % sampling interval |" in text
    assert "The allowance for drift between runs is separate: 2% of each median." in text
    assert "| ratio of bounds |" in text
    assert "| 1 | 4 | 0.5 | 0.4 to 0.6 | 0.7 | memory, launches |" in text
    assert "| batch | router | experts (by difference) |" in text
    assert "| 1 | 0.25 (0.2 to 0.3) | 0.75 (0.6 to 0.9) |" in text
    assert "- cuda_graph; model; batch 1, 32: needs a CUDA device\n- batch 64: out of memory" in text
    assert f"50 to 50 runs each on a CPU: {timing().environment} (load 0.25 at the end)." in text
    assert "Not counted in a pass of the model: relu 2×." in text
    assert "100 GFLOP/s" in text
    assert f"torch {torch.__version__}" in text


def test_columns_come_with_what_they_show() -> None:
    assert "MFLOP" not in timing().summary()
    full = row("model", 1, 2.0, flops=3_000_000, peak_share=0.25, device_p50_ms=1.5, peak_memory=2**21)
    least = row("head", 1, 1.0, flops=2_000_000, flops_complete=False)
    text = replace(timing(), rows=(full, least)).summary()
    assert "| ≥ 2 |" in text
    assert "| device p50 ms | MFLOP | of peak | peak MiB |" in text
    assert "| 1.5 | 3 | 25.0% | 2 |" in text


def test_a_noisy_machine_and_a_warm_up_that_was_not_stable_are_said() -> None:
    assert not timing().is_noisy
    assert "Noisy" not in timing().summary()
    wide = row("model", 1, 2.0, p50_low_ms=1.9, p50_high_ms=2.15, is_stable=False)
    noisy = replace(timing(), rows=(wide, *timing().rows[1:3]), partial="stopped")
    assert noisy.is_noisy
    assert "**Noisy machine**: intervals of medians are wider than 10%" in noisy.summary()
    assert "The warm-up of 1 of 3 rows ended before it was stable." in noisy.summary()
    assert "**Partial**: stopped." in noisy.summary()
    # too few runs are no sign of noise
    few = replace(timing(), rows=(row("model", 1, 2.0, p50_low_ms=0.0, p50_high_ms=float("inf")),))
    assert not few.is_noisy
    assert "| 2 | unknown | 4 |" in few.summary()

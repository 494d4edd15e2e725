import warnings

import torch
from torch import nn

from moe_heads.callbacks.functional.common.environment import environment_of
from moe_heads.callbacks.functional.timing.result import InferenceTimingResult
from moe_heads.callbacks.functional.timing.row import TimingRow


def row(module: str, size: int, p50: float) -> TimingRow:
    return TimingRow(size, "eager", module, p50, 2 * p50, 4 * p50, 1.5 * p50, 0.1, 50, 1000 * size / (1.5 * p50))


def timing() -> InferenceTimingResult:
    rows = row("model", 1, 2.0), row("head", 1, 1.0), row("model", 32, 20.0), row("head", 32, 3.0)
    return InferenceTimingResult(rows, environment_of(nn.Linear(1, 1)), warmup_runs=10, seed=0)


def test_metrics_name_module_and_batch_size() -> None:
    metrics = timing().metrics()
    assert len(metrics) == 16
    assert metrics["head/batch32/p50_ms"] == 3.0
    assert metrics["model/batch1/p99_ms"] == 8.0
    assert metrics["model/batch32/samples_per_s"] == 32000 / 30


def test_summary_is_a_table_with_the_environment() -> None:
    text = timing().summary()
    assert "| model | 32 | eager | 20 | 40 | 80 | 1,067 |" in text
    assert f"50 runs each after 10 to warm up; {timing().environment}." in text
    assert f"torch {torch.__version__}" in text


def test_plot_has_a_line_a_module_and_whiskers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure, ax = timing().plot()
        figure.savefig("/dev/null", format="png")
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    lines = {line.get_label(): line.get_ydata().tolist() for line in ax.get_lines() if line.get_label()[0] != "_"}
    assert lines == {"model": [2.0, 20.0], "head": [1.0, 3.0]}
    tops = {float(segment[:, 1].max()) for whiskers in ax.collections for segment in whiskers.get_segments()}
    assert tops == {4.0, 40.0, 2.0, 6.0, 8.0, 80.0, 12.0}


def test_plot_uses_the_axes_given() -> None:
    from matplotlib.figure import Figure

    own = Figure().subplots()
    figure, ax = timing().plot(own)
    assert ax is own
    assert figure is own.figure

"""Contents of the figures, and their layout in a card of TensorBoard."""

from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from moe_heads.analysis.inference_timing.speedup import Gap
from tests.moe_heads.analysis.inference_timing.test_result import row, timing


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_latency_has_a_line_a_module_and_its_bands() -> None:
    parts = row("head.router", 1, 0.5), row("head.router", 32, 0.6)
    figure, ax = replace(timing(), rows=(*timing().rows, *parts)).plot()
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    lines = {line.get_label(): line.get_ydata().tolist() for line in ax.get_lines()}
    assert lines == {"model, eager": [2.0, 20.0], "head, eager": [1.0, 3.0]}  # stages are in the figure of the split
    tops = [round(float(band.get_paths()[0].vertices[:, 1].max()), 6) for band in ax.collections]
    assert tops == [20.2, 80.0, 3.03, 12.0]
    assert legend_of(figure) == ["model", "head"]


def test_throughput_turns_the_interval_over() -> None:
    (ax,) = timing().plot_throughput().axes
    assert ax.get_lines()[0].get_ydata().tolist() == [500.0, 1600.0]
    band = ax.collections[0].get_paths()[0].vertices
    assert float(band[:, 1].min()) == 1e3 / 2.02


def test_the_gap_has_three_lines_with_markers_and_ticks_between_the_powers_of_ten() -> None:
    figure = timing().plot_gap()
    ax, _ = figure.axes
    lines = {line.get_label(): line for line in ax.get_lines() if line.get_label()[0] != "_"}
    values = {name: list(line.get_ydata()) for name, line in lines.items()}
    assert values == {"realized": [0.5, 2.0], "theoretical": [4.0, 4.0], "ratio of bounds": [0.7, 3.0]}
    assert {line.get_marker() for line in lines.values()} == {"o", "^", "s"}
    figure.draw_without_rendering()
    low, high = ax.get_ylim()
    shown = {label.get_text() for label in ax.get_yticklabels() if low <= label.get_position()[1] <= high}
    assert {"0.5", "1", "2"} <= shown


def test_the_break_even_has_its_interval() -> None:
    ax, _ = timing().plot_gap().axes
    (span,) = ax.patches
    assert (span.get_x(), span.get_x() + span.get_width()) == (4.0, 8.0)


def gaps(*heads_and_modes: tuple[str, str]) -> tuple[Gap, ...]:
    (gap,) = timing().gaps
    return tuple(replace(gap, head=head, mode=mode) for head, mode in heads_and_modes)


@pytest.mark.parametrize(
    ("pairs", "labels"),
    [
        ([("head", "bf16")], ["realized", "theoretical", "ratio of bounds"]),
        (
            [("head", "eager"), ("head", "bf16")],
            ["realized, eager", "realized, bf16", "theoretical", "ratio of bounds"],
        ),
        (
            [("a", "eager"), ("b", "eager")],
            [
                "a, realized",
                "b, realized",
                "a, theoretical",
                "a, ratio of bounds",
                "b, theoretical",
                "b, ratio of bounds",
            ],
        ),
    ],
)
def test_no_entry_of_the_legend_of_the_gap_comes_twice(pairs: list, labels: list[str]) -> None:
    assert legend_of(replace(timing(), gaps=gaps(*pairs)).plot_gap()) == labels


def test_without_bounds_there_is_no_line_of_them() -> None:
    (gap,) = timing().gaps
    bare = replace(gap, points=tuple(replace(point, bound=None) for point in gap.points))
    assert legend_of(replace(timing(), gaps=(bare,)).plot_gap()) == ["realized", "theoretical"]


def test_the_split_has_bars_that_fill() -> None:
    (panel,) = timing().plot_split().axes
    assert [bar.get_height() for bar in panel.patches] == [0.25, 0.75]


def test_modes_have_dash_patterns_in_a_legend_that_does_not_grow_with_their_product() -> None:
    rows = [replace(row(name, 1, 2.0), mode=mode) for name in ("model", "head") for mode in ("eager", "compiled")]
    figure, ax = replace(timing(), rows=tuple(rows)).plot()
    looks = {line.get_label(): (line.get_linestyle(), line.get_marker()) for line in ax.get_lines()}
    assert looks == {
        "model, eager": ("-", "o"),
        "model, compiled": ("--", "o"),
        "head, eager": ("-", "o"),
        "head, compiled": ("--", "o"),
    }
    assert legend_of(figure) == ["model", "head", "eager", "compiled"]


def test_figures_have_the_size_of_a_card_and_the_legend_is_beside_the_axes() -> None:
    long = replace(timing(), rows=(*timing().rows, row("encoder.layers.7.mixture.head", 1, 1.0)))
    bare = replace(long, parts=())
    for figure in (long.plot()[0], long.plot_throughput(), bare.plot_gap(), long.plot_split()):
        assert tuple(figure.get_size_inches()) == (4.4, 2.3)
        figure.draw_without_rendering()
        for ax in figure.axes:
            inside, legend = ax.get_window_extent(), ax.get_legend().get_window_extent()
            assert legend.x0 >= inside.x1
            assert legend.x1 <= figure.bbox.x1
            assert inside.width > 0.35 * figure.bbox.width / len(figure.axes)
    assert "….7.mixture.head" in legend_of(long.plot()[0])


def test_plot_uses_the_axes_given() -> None:
    own = Figure().subplots()
    figure, ax = timing().plot(own)
    assert ax is own
    assert figure is own.figure


def test_without_heads_there_is_no_figure_of_them() -> None:
    bare = replace(timing(), gaps=(), parts=())
    assert bare.plot_gap() is None
    assert bare.plot_split() is None

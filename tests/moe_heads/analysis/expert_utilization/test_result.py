import dataclasses
import math
import warnings

import pytest
import torch

from moe_heads.analysis.expert_utilization.head_utilization import HeadUtilization
from moe_heads.analysis.expert_utilization.result import ExpertUtilizationResult
from tests.support.utilizations import heads_of


def utilization(labeled: bool = True, num_classes: int = 2, num_choices: int = 1000) -> HeadUtilization:
    class_map = torch.full((num_classes, 3), 1 / 3, dtype=torch.float64)
    class_map[-1] = math.nan
    return HeadUtilization(
        load=torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64),
        importance=torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64),
        entropy=0.1,
        entropy_of_mean=0.6,
        effective_experts=2.0,
        effective_experts_per_row=1.0,
        margin=0.5,
        dropped=0.0,
        dead_experts=(2,),
        starved_experts=(),
        coactivation=None,
        class_counts=torch.tensor([[6, 1, 0], [1, 2, 0]]) if labeled and num_classes == 2 else None,
        class_map=class_map if labeled else None,
        mutual_information=0.3 if labeled else None,
        mutual_information_corrected=0.25 if labeled else None,
        mutual_information_stderr=0.01 if labeled else None,
        mutual_information_by_chance=None,
        mutual_information_p_value=None,
        soft=False,
        num_rows=10,
        num_choices=num_choices,
        num_nonfinite=0,
    )


def result(**heads: HeadUtilization) -> ExpertUtilizationResult:
    return ExpertUtilizationResult(heads, ("cat", "dog"), num_samples=10)


def test_metrics_are_flat_floats() -> None:
    metrics = result(head=utilization()).metrics()
    assert metrics["head/num_dead_experts"] == 1.0
    assert metrics["head/max_violation"] == pytest.approx(1.25)
    assert metrics["head/load_cv"] == pytest.approx(math.sqrt(((0.75 * 3 - 1) ** 2 + (0.25 * 3 - 1) ** 2 + 1) / 3))
    assert metrics["head/mutual_information"] == 0.3
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    assert not any("information" in key for key in result(head=utilization(labeled=False)).metrics())


def test_summary_names_heads_and_dead_experts() -> None:
    text = result(first=utilization(), second=utilization()).summary()
    assert text.startswith("| quantity | first | second |\n| --- | --- | --- |\n| entropy | 0.1 | 0.1 |")
    assert "Dead in second: 1 of 3 experts, number 2." in text
    assert "by chance" not in text
    assert "No classes" not in text
    assert "there are no experts to report on" in result().summary()


def test_summary_says_what_the_data_cannot_tell() -> None:
    few = result(head=utilization(num_choices=10)).summary()
    assert "number 2. The fair share is only 3.3 choices, so an even router can have such experts by chance." in few
    # two of three empty at 9 choices each is no chance
    gone = dataclasses.replace(utilization(num_choices=27), load=torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    assert "by chance." not in result(head=gone).summary()
    unlabeled = ExpertUtilizationResult({"head": utilization(labeled=False)}, (), num_samples=10).summary()
    assert "No classes: the batches have no labels of shape (B,)" in unlabeled


@pytest.mark.parametrize("head", [utilization(), utilization(labeled=False), utilization(num_classes=100)])
def test_figures_render_without_a_warning(head: HeadUtilization) -> None:
    rows = 0 if head.class_map is None else len(head.class_map)
    found = ExpertUtilizationResult({"head": head}, tuple(f"class {i}" for i in range(rows)), 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure, ax = found.plot()
        figure.savefig("/dev/null", format="png")
    assert ax.get_xlabel() == "expert"
    assert figure.axes[0].get_title().startswith("head: 2.0 effective experts of 3")
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0.75, 0.25, 0, 0.5, 0.5, 0]
    if head.class_map is not None:
        second = "class 1" if rows == 2 else "class 2"  # of a hundred, every second one has room
        assert [label.get_text() for label in ax.get_yticklabels()][:2] == ["class 0", second]
        drawn = torch.from_numpy(ax.images[0].get_array().data)
        torch.testing.assert_close(drawn[:-1], 100 * head.class_map[:-1])  # per cent


def test_plot_draws_the_head_asked_for_into_given_axes() -> None:
    from matplotlib.figure import Figure

    own = Figure().subplots()
    figure, ax = result(first=utilization(), second=utilization(labeled=False)).plot(own, head="second")
    assert ax is own
    assert figure is own.figure
    assert ax.get_title().startswith("second: 2.0 effective experts of 3")
    assert len(ax.patches) == 6
    own = Figure().subplots()
    assert result(first=utilization()).plot(own)[1] is own
    assert len(own.images) == 1


def test_a_head_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="head: expected one of 'first', got 'second'"):
        result(first=utilization()).plot(head="second")
    with pytest.raises(ValueError, match="head: expected a model with a router that ran"):
        result().plot()
    assert result().relative_load_percentiles == {}


def test_the_summary_of_one_head_has_the_numbers_that_are_worth_a_chart() -> None:
    one = result(head=utilization())
    full, summary = one.metrics(), one.metrics("summary")
    assert summary.items() < full.items()
    kept = {"effective_experts", "num_dead_experts", "max_violation", "entropy", "mutual_information"}
    assert {f"head/{name}" for name in kept} <= summary.keys()
    assert full.keys() - summary.keys() >= {"head/load_max", "head/num_rows", "head/relative_load_p10"}
    assert one.texts("summary") == one.texts()


def test_unknown_numbers_are_not_logged_and_called_unknown() -> None:
    unknown = dataclasses.replace(utilization(), entropy=math.nan, entropy_of_mean=math.nan, margin=math.nan)
    for found in (result(head=unknown), result(head=unknown, other=unknown)):
        for detail in ("summary", "full"):
            assert all(math.isfinite(value) for value in found.metrics(detail).values())
            assert not any("entropy" in key or "margin" in key for key in found.metrics(detail))
        assert "| entropy | unknown |" in found.summary()
        figures = found.figures("summary")
        figures["head/load"].savefig("/dev/null", format="png")


def test_the_output_of_many_layers_is_bounded() -> None:
    heads = heads_of(48, 128, mutual_information=0.1)
    found = ExpertUtilizationResult(heads, (), 1000, partial="time is up")
    assert len(found.metrics("summary")) <= 20
    assert found.metrics("summary")["partial"] == 1
    assert len(found.metrics()) > 48 * 10
    assert "all_heads/relative_load_p50" in found.metrics()
    shown = {name.split("/")[0] for name in found.texts("summary")} - {"summary"}
    assert len(shown) == 2
    assert all(heads[name].dead_experts for name in shown)
    figures = found.figures("summary")
    assert figures.keys() == {"load_by_layer", *(f"{name}/load" for name in shown)}
    assert len(found.texts()) == 49
    text = found.summary()
    assert "48 layers with 128 experts each. Dead: 9 experts in 9 layers." in text
    assert "**Partial**: time is up." in text
    assert len(text) < 5000

"""Charts of the training series."""

import re

import pytest

from moe_heads.analysis.expert_utilization.head_utilization import Detail
from moe_heads.analysis.expert_utilization.layers import LEVELS, Layer, training_numbers
from moe_heads.analysis.expert_utilization.layout import Charts, utilization_charts
from moe_heads.analysis.expert_utilization.metric import utilization_scalars
from tests.support.utilizations import stats_of

PREFIX = "expert_utilization/epoch"
RARE = {
    "noise_agreement": 1.0,
    "router_gradient_norm": 1.0,
    "routing_flips": 0.1,
    "dropped_choices": 0.1,
    "num_inert_experts": 0.0,
    "weight_norm_min": 0.9,
    "stable_rank_min": 0.9,
}


def tags_of(sizes: dict[str, int], detail: Detail) -> list[str]:
    """All tags of an epoch."""
    layers = {}
    for name, size in sizes.items():
        stats = stats_of([3] * size)
        numbers = {**utilization_scalars(stats), "num_dead_experts": 0.0, "num_starved_experts": 0.0, **RARE}
        layers[name] = Layer.of_stats(stats, False, 0.01, 0.25, numbers)
    return [f"{PREFIX}/{key}" for key in training_numbers(layers, detail, len(sizes) > 1)]


def drawn(charts: Charts, tags: list[str]) -> dict[str, list[str]]:
    """Tags of each chart, as TensorBoard finds them: by re.match of a multiline chart, by name of a margin chart."""
    found = {}
    for title, (kind, wanted) in charts.items():
        if kind == "Margin":
            assert len(wanted) == 3
            assert set(wanted) <= set(tags), title
            found[title] = wanted
        else:
            found[title] = [tag for tag in tags for pattern in wanted if re.match(pattern, tag)]
            assert all(any(re.match(pattern, tag) for tag in tags) for pattern in wanted), title
    return found


@pytest.mark.parametrize("detail", ["summary", "full"])
@pytest.mark.parametrize("sizes", [{"head": 8}, {"a.0.b": 17}, {"layers.0": 4, "layers.1": 20}])
def test_every_chart_draws_numbers_that_are_logged(sizes: dict[str, int], detail: Detail) -> None:
    tags = tags_of(sizes, detail)
    found = drawn(utilization_charts(PREFIX, sizes, detail), tags)
    assert all(found.values())
    missing = set(tags) - {tag for some in found.values() for tag in some}
    # the percentiles of few experts and the importance follow from what is drawn
    assert all(re.search(r"/(importance_\d+|relative_load_p\d+|load_\d+)$", tag) for tag in missing)
    assert detail == "full" or not missing


def test_the_loads_of_a_head_are_in_one_chart() -> None:
    sizes = {"a.b": 16, "axb": 4, "many": 128}
    found = drawn(utilization_charts(PREFIX, sizes, "full"), tags_of(sizes, "full"))
    assert found["a.b: load of each expert"] == [f"{PREFIX}/a.b/load_{expert}" for expert in range(16)]
    assert found["many: load / fair share, p10, p50, p90 of the experts"] == [
        f"{PREFIX}/many/relative_load_p{level}" for level in (50, 10, 90)
    ]


def test_every_level_of_the_summary_over_layers_has_a_chart() -> None:
    charts = utilization_charts(PREFIX, {"a": 4, "b": 4}, "summary")
    in_charts = {tag.removesuffix("$") for _, tags in charts.values() for tag in tags}
    for measure in LEVELS.keys() - {"dropped", "dropped_choices", "nonfinite"}:
        assert any(f"/{measure}/" in tag for tag in in_charts)

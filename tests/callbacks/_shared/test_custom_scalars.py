"""Charts on TensorBoard's page of custom scalars."""

from pathlib import Path

import pytest
import torch
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils.tensorboard import SummaryWriter

from moe_heads.callbacks._shared.custom_scalars import write_charts
from tests.support.events import read_layout

CHARTS = {"loads": ("Multiline", ["load_\\d+$"]), "range": ("Margin", ["a", "b", "c"])}


def titles(layout: Layout) -> dict[str, list[str]]:
    return {group.title: [chart.title for chart in group.chart] for group in layout.category}


@pytest.fixture
def writer(tmp_path: Path) -> SummaryWriter:
    return SummaryWriter(tmp_path)


def test_charts_are_those_of_add_custom_scalars(writer: SummaryWriter, tmp_path: Path) -> None:
    write_charts(writer, str(tmp_path), "health", CHARTS)
    alone = SummaryWriter(tmp_path / "alone")
    alone.add_custom_scalars({"health": {name: list(chart) for name, chart in CHARTS.items()}})
    alone.close()
    assert read_layout(tmp_path) == read_layout(tmp_path / "alone")
    assert read_layout(tmp_path).category[0].chart[1].margin.series[0].upper == "c"


def test_charts_of_the_user_and_of_other_callbacks_stay(writer: SummaryWriter, tmp_path: Path) -> None:
    writer.add_custom_scalars({"mine": {"loss": ["Multiline", ["loss"]]}})
    writer.add_scalar("loss", 1.0, 3)
    writer.add_image("image", torch.zeros(3, 4, 4), 3)
    write_charts(writer, str(tmp_path), "health", CHARTS)
    write_charts(writer, str(tmp_path), "other", {"loss": ("Multiline", ["loss"])})
    assert titles(read_layout(tmp_path)) == {"mine": ["loss"], "health": ["loads", "range"], "other": ["loss"]}


def test_a_second_time_replaces_the_group(writer: SummaryWriter, tmp_path: Path) -> None:
    for charts in (CHARTS, CHARTS, {"loads": CHARTS["loads"]}):
        write_charts(writer, str(tmp_path), "health", charts)
    assert titles(read_layout(tmp_path)) == {"health": ["loads"]}

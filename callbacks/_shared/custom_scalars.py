"""Charts on TensorBoard's page of custom scalars."""

from collections.abc import Mapping, Sequence
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars

__all__ = ["Charts", "write_charts"]

Charts = Mapping[str, tuple[str, Sequence[str]]]
"""Type ("Multiline" or "Margin") and tags of each chart by its title; see `SummaryWriter.add_custom_scalars`."""


def write_charts(writer: SummaryWriter, folder: str, title: str, charts: Charts) -> None:
    """Add a group of charts to the page, and keep the groups that are already there.

    TensorBoard shows only the last layout of a run. So `SummaryWriter.add_custom_scalars` would hide charts of the user
    and of other callbacks.

    Args:
        writer: Writer of the run.
        folder: Folder of its event files.
        title: Title of the group. A group with the same title is replaced.
        charts: The charts.
    """
    writer.flush()
    summary = custom_scalars({title: {name: list(chart) for name, chart in charts.items()}})
    layout = Layout()
    layout.category.extend(group for group in _layout_in(folder).category if group.title != title)
    layout.MergeFromString(summary.value[0].tensor.string_val[0])  # appends
    summary.value[0].tensor.string_val[0] = layout.SerializeToString()
    events: Any = writer.file_writer
    events.add_summary(summary)
    writer.flush()


def _layout_in(folder: str) -> Layout:
    """Return the last layout in the event files of a folder, an empty one if there is none."""
    events = EventAccumulator(folder, size_guidance={"tensors": 1, "images": 1}).Reload()
    if CONFIG_SUMMARY_TAG not in events.Tags()["tensors"]:
        return Layout()
    return Layout.FromString(events.Tensors(CONFIG_SUMMARY_TAG)[-1].tensor_proto.string_val[0])

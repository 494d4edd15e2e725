"""Read TensorBoard event files back."""

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG, PLUGIN_NAME


def read_events(folder: Path) -> Any:
    """Everything in the event files of a folder."""
    kinds = ("scalars", "tensors", "images", "histograms", "compressedHistograms", "audio")
    return EventAccumulator(str(folder), size_guidance=dict.fromkeys(kinds, 0)).Reload()


def read_layout(folder: Path) -> Layout:
    """The page of custom scalars of a run, read as TensorBoard's plugin does; empty if there is none."""
    provider = MultiplexerDataProvider(EventMultiplexer({".": str(folder)}).Reload(), str(folder))
    found = provider.read_tensors(RequestContext(), experiment_id="", plugin_name=PLUGIN_NAME, downsample=1)
    return Layout.FromString(found["."][CONFIG_SUMMARY_TAG][0].numpy.item()) if found else Layout()

"""Read TensorBoard event files back."""

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_events(folder: Path) -> Any:
    """Everything in the event files of a folder."""
    kinds = ("scalars", "tensors", "images", "histograms", "compressedHistograms", "audio")
    return EventAccumulator(str(folder), size_guidance=dict.fromkeys(kinds, 0)).Reload()

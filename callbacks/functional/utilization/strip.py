"""Figure: what each expert sees, the samples that it receives with the highest gate."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_heads.callbacks.functional.common.figures import plain_text
from moe_heads.callbacks.functional.utilization.examples import ExpertExamples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_examples"]

# Inches: an image with the gap beside it, and the number of the expert before a row. Share of an image's width: the
# gap, and the room for two lines of text above it.
_CELL, _NUMBER = 0.6, 0.3
_GAP, _TEXT = 0.1, 0.65


def plot_examples(examples: ExpertExamples, class_names: Sequence[str]) -> "Figure":
    """A row of images for each expert, with class and gate above each.

    Args:
        examples: The images.
        class_names: Names of the classes; may be empty.
    """
    from matplotlib.figure import Figure

    # one picture of all of them: axes for each would take four times as long to draw
    num_experts, count, _, height, width = examples.images.shape
    across, above = width + max(1, round(_GAP * width)), max(1, round(_TEXT * width))
    down = height + above
    sheet = np.full((num_experts * down, count * across, 3), 255, dtype=np.uint8)
    size = _NUMBER + _CELL * count, _CELL * num_experts * down / across
    figure = Figure(figsize=size)
    left = _NUMBER / size[0]
    ax = figure.add_axes((left, 0, 1 - left, 1))
    ax.set_axis_off()
    for expert in range(num_experts):
        top = expert * down + above
        ax.text(-0.06 * width, top + height / 2, f"{expert}", fontsize=9, ha="right", va="center")
        for place in range(count):
            gate = float(examples.gates[expert, place])
            if gate > 0:
                start, image = place * across, examples.images[expert, place]
                sheet[top : top + height, start : start + width] = image.permute(1, 2, 0).numpy()
                title = _title(int(examples.labels[expert, place]), gate, class_names)
                ax.text(start + width / 2, top - 0.06 * width, title, fontsize=7, ha="center", va="bottom")
    ax.imshow(sheet, extent=(0, sheet.shape[1], sheet.shape[0], 0))
    return figure


def _title(label: int, gate: float, class_names: Sequence[str]) -> str:
    name = "" if label < 0 else class_names[label] if label < len(class_names) else str(label)
    return f"{plain_text(name, 10)}\n{gate:.2f}"

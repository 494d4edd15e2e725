"""Figure: what each expert sees, the samples that it receives with the highest gate."""

from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

import numpy as np

from moe_heads.callbacks.functional.common.figures import plain_text
from moe_heads.callbacks.functional.utilization.examples import ExpertExamples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_examples"]

# Inches: an image with the gap beside it, and the number of the expert before a row. Share of an image's width: the
# gap, and the room above it for the gate and for each line of the class. Letters of such a line, and its lines at most.
_CELL, _NUMBER, _LINE = 0.6, 0.3, 0.2
_GAP, _TEXT, _TEXT_OF_LINE = 0.1, 0.35, 0.3
_LETTERS, _LINES = 11, 3


def plot_examples(examples: ExpertExamples, class_names: Sequence[str], num_experts: int) -> "Figure":
    """A row of images for each expert, with class and gate above each.

    Args:
        examples: The images, of the first experts where there are too many.
        class_names: Names of the classes; may be empty.
        num_experts: E.
    """
    from matplotlib.figure import Figure

    # one picture of all of them: axes for each would take four times as long to draw
    shown, count, _, height, width = examples.images.shape
    names = _wrapped_names(examples, class_names)
    text = _TEXT + _TEXT_OF_LINE * max(len(lines) for lines in names.values())
    across, above = width + max(1, round(_GAP * width)), max(1, round(text * width))
    down = height + above
    sheet = np.full((shown * down, count * across, 3), 255, dtype=np.uint8)
    note = f"the first {shown} of {num_experts} experts" if shown < num_experts else ""
    head = _LINE if note else 0.0
    size = _NUMBER + _CELL * count, head + _CELL * shown * down / across
    figure = Figure(figsize=size)
    figure.text(_NUMBER / size[0], 1 - 0.05 / size[1], note, fontsize=8, va="top")
    left = _NUMBER / size[0]
    ax = figure.add_axes((left, 0, 1 - left, 1 - head / size[1]))
    ax.set_axis_off()
    for expert in range(shown):
        top = expert * down + above
        ax.text(-0.06 * width, top + height / 2, f"{expert}", fontsize=9, ha="right", va="center")
        received = [(place, gate) for place, gate in enumerate(examples.gates[expert].tolist()) if gate > 0]
        if not received:
            ax.text(0.1 * width, top + height / 2, "no sample", fontsize=8, color="0.4", va="center")
        for place, gate in received:
            start, image = place * across, examples.images[expert, place]
            sheet[top : top + height, start : start + width] = image.permute(1, 2, 0).numpy()
            title = "\n".join([*names[int(examples.labels[expert, place])], f"{gate:.2f}"])
            ax.text(start + width / 2, top - 0.06 * width, title, fontsize=7, ha="center", va="bottom")
    ax.imshow(sheet, extent=(0, sheet.shape[1], sheet.shape[0], 0))
    return figure


def _wrapped_names(examples: ExpertExamples, class_names: Sequence[str]) -> dict[int, list[str]]:
    """Lines of the name of each class among the examples."""
    labels = examples.labels.unique().tolist()
    names = {c: "" if c < 0 else class_names[c] if c < len(class_names) else str(c) for c in labels}
    lines = {c: wrap(" ".join(name.split()), _LETTERS, max_lines=_LINES, placeholder="…") for c, name in names.items()}
    return {c: [plain_text(line, _LETTERS) for line in wrapped] for c, wrapped in lines.items()}

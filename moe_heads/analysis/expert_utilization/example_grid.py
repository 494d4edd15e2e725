"""Figure of the samples that each expert receives with the highest gate."""

from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from moe_heads.analysis._shared.figures import plain_text
from moe_heads.analysis.expert_utilization.examples import ExpertExamples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_examples"]

# In inches: an image with its gap, the number of the expert before a row, and a line of the note.
_CELL, _NUMBER, _LINE = 0.6, 0.3, 0.16
# As fractions of the width of an image: the gap, and the space above it for the gate and for each line of the class.
_GAP, _TEXT, _TEXT_PER_LINE = 0.1, 0.35, 0.3
# Characters of a line of the class, and its largest number of lines.
_CHARACTERS, _MAX_LINES = 11, 3

# Largest number of experts, smallest width in images, so that a note fits, and characters of the note per inch.
_MAX_ROWS, _MIN_COLUMNS, _CHARACTERS_PER_INCH = 32, 4, 14


def plot_examples(examples: ExpertExamples, class_names: Sequence[str], load: Tensor) -> "Figure":
    """Draw a row of images per expert, with class and gate above each, for the 32 experts with the highest load.

    Args:
        examples: The images.
        class_names: Names of the classes. May be empty.
        load: Load of the experts, (E,).
    """
    from matplotlib.figure import Figure

    # one picture of all images: one pair of axes per image would take four times as long to draw
    experts, note = _select_experts(examples, load)
    count, _, height, width = examples.images.shape[1:]
    names = _wrap_names(examples, class_names)
    text = _TEXT + _TEXT_PER_LINE * max(len(lines) for lines in names.values())
    across, above = width + max(1, round(_GAP * width)), max(1, round(text * width))
    down = height + above
    sheet = np.full((max(1, len(experts)) * down, count * across, 3), 255, dtype=np.uint8)
    across_inches = _NUMBER + _CELL * max(count, _MIN_COLUMNS)
    lines = wrap(note, int(_CHARACTERS_PER_INCH * across_inches))
    head = _LINE * len(lines)
    size = across_inches, head + _CELL * sheet.shape[0] / across
    figure = Figure(figsize=size)
    left = _NUMBER / size[0]
    figure.text(left, 1 - 0.05 / size[1], "\n".join(lines), fontsize=8, va="top")
    ax = figure.add_axes((left, 0, _CELL * count / size[0], 1 - head / size[1]))
    ax.set_axis_off()
    for row, expert in enumerate(experts):
        top = row * down + above
        ax.text(-0.06 * width, top + height / 2, f"{expert}", fontsize=9, ha="right", va="center")
        for place, gate in enumerate(examples.gates[expert].tolist()):
            if gate > 0:
                start, image = place * across, examples.images[expert, place]
                sheet[top : top + height, start : start + width] = image.permute(1, 2, 0).numpy()
                title = "\n".join([*names[int(examples.labels[expert, place])], f"{gate:.2f}"])
                ax.text(start + width / 2, top - 0.06 * width, title, fontsize=7, ha="center", va="bottom")
    ax.imshow(sheet, extent=(0, sheet.shape[1], sheet.shape[0], 0))
    return figure


def _select_experts(examples: ExpertExamples, load: Tensor) -> tuple[list[int], str]:
    """Select the experts to draw, ascending, and write a note about the others."""
    received = (examples.gates > 0).any(1)
    used, empty = received.nonzero().flatten(), (~received).nonzero().flatten().tolist()
    first = used[load[used].argsort(descending=True, stable=True)[:_MAX_ROWS]].sort().values.tolist()
    notes = []
    if len(first) < len(used):
        notes.append(f"the {len(first)} experts of {len(load)} with the highest load")
    elif len(received) < len(load):
        notes.append(f"of the first {len(received)} of {len(load)} experts")
    if empty:
        more = f" and {len(empty) - _MAX_ROWS} more" if len(empty) > _MAX_ROWS else ""
        notes.append(f"no sample: {', '.join(map(str, empty[:_MAX_ROWS]))}{more}")
    return first, "; ".join(notes)


def _wrap_names(examples: ExpertExamples, class_names: Sequence[str]) -> dict[int, list[str]]:
    """Wrap the name of each class among the examples into lines."""
    labels = examples.labels.unique().tolist()
    names = {c: "" if c < 0 else class_names[c] if c < len(class_names) else str(c) for c in labels}
    lines = {
        c: wrap(" ".join(name.split()), _CHARACTERS, max_lines=_MAX_LINES, placeholder="…") for c, name in names.items()
    }
    return {c: [plain_text(line, _CHARACTERS) for line in wrapped] for c, wrapped in lines.items()}

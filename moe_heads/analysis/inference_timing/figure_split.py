"""Figure of where the time goes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_heads.analysis.inference_timing.calls import MODEL
from moe_heads.analysis.inference_timing.figures import FONT, SIZE, short_name
from moe_heads.analysis.inference_timing.split import Part

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_split"]

_COLORS = {
    "backbone": "C0",
    "head": "C1",
    "rest": "0.7",
    "router": "C2",
    "dispatch": "C3",
    "experts": "C1",
    "combine": "C4",
}


def plot_split(parts: Sequence[Part], device: str) -> "Figure":
    """Bars of the shares of each part over batch size: a panel for the model and one for each head, two a row."""
    from matplotlib.figure import Figure

    wholes = list(dict.fromkeys(part.whole for part in parts))
    num_rows, num_columns = -(-len(wholes) // 2), min(len(wholes), 2)
    figure = Figure(figsize=(SIZE[0], SIZE[1] * num_rows), layout="constrained")
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for panel, whole in zip(panels, wholes, strict=False):
        _draw_shares(panel, [part for part in parts if part.whole == whole])
        panel.set_title(f"parts of {'the model' if whole == MODEL else whole}", fontsize=FONT)
        panel.set_xlabel("batch size", fontsize=FONT)
    for empty in panels[len(wholes) :]:
        empty.remove()
    figure.suptitle(f"share of the time; {short_name(device)}", fontsize=FONT)
    return figure


def _draw_shares(ax: "Axes", parts: Sequence[Part]) -> None:
    sizes = list(dict.fromkeys(part.batch_size for part in parts))
    names = list(dict.fromkeys(part.name for part in parts))
    # a difference that came out below zero has no bar
    heights = {(part.batch_size, part.name): max(part.ms, 0.0) for part in parts}
    totals = [sum(heights.get((size, name), 0.0) for name in names) for size in sizes]
    bottom = [0.0] * len(sizes)
    for name in names:
        shares = [heights.get((size, name), 0.0) / total for size, total in zip(sizes, totals, strict=True)]
        ax.bar(range(len(sizes)), shares, bottom=bottom, color=_COLORS[name], label=name, width=0.75)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    ax.set_xticks(range(len(sizes)), [f"{size}" for size in sizes], rotation=90 if len(sizes) > 3 else 0)
    ax.set_ylim(0, 1)
    ax.tick_params(labelsize=FONT - 1)
    ax.legend(
        fontsize=FONT - 1, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True, frameon=False, handlelength=1.0
    )

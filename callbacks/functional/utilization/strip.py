"""Figure: what each expert sees, the samples that it receives with the highest gate."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_heads.callbacks.functional.common.figures import plain_text
from moe_heads.callbacks.functional.utilization.examples import ExpertExamples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_examples"]


def plot_examples(examples: ExpertExamples, class_names: Sequence[str]) -> "Figure":
    """A row of images for each expert, with class and gate above each.

    Args:
        examples: The images.
        class_names: Names of the classes; may be empty.
    """
    from matplotlib.figure import Figure

    num_experts, count = examples.gates.shape
    figure = Figure(figsize=(0.5 + 0.6 * count, 0.9 * num_experts), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.03, wspace=0, hspace=0)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(num_experts, count, squeeze=False)
    for expert in range(num_experts):
        for place in range(count):
            ax = axes[expert, place]
            ax.set(xticks=[], yticks=[], frame_on=False)
            gate = float(examples.gates[expert, place])
            if gate > 0:
                image = examples.images[expert, place]
                shown = image[0] if len(image) == 1 else image.permute(1, 2, 0)
                ax.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=255)
                ax.set_title(_title(int(examples.labels[expert, place]), gate, class_names), fontsize=7, pad=1)
        axes[expert, 0].set_ylabel(f"{expert}", fontsize=9, rotation=0, ha="right", va="center")
    return figure


def _title(label: int, gate: float, class_names: Sequence[str]) -> str:
    name = "" if label < 0 else class_names[label] if label < len(class_names) else str(label)
    return f"{plain_text(name, 10)}\n{gate:.2f}"

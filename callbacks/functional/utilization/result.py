"""What an expert utilisation analysis found, and how it is reported."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ExpertUtilizationResult", "HeadUtilization"]


@dataclass(frozen=True, eq=False)
class HeadUtilization:
    r"""How the experts of one head are used. Entropies and mutual information in nats; tensors float64 on the CPU.

    Attributes:
        load: Share of the choices that went to each expert, (E,). A soft router chooses its largest gate.
        importance: Share of the mixing weight that went to each expert, (E,).
        entropy: Mean entropy of a row's full softmax: near 0 for a decided router, log E for one that mixes evenly.
        entropy_of_mean: Entropy of the mean softmax: log E when the experts are used evenly over the data.
        effective_experts: :math:`\exp H(\text{importance})`, 1 to E.
        dead_experts: Experts with less than ``dead_below`` of the fair share 1/E of the load; of the importance, for a
            soft router.
        class_map: Share of the mixing weight that the samples of a class gave to each expert, (C, E); where gates sum
            to one, their mean. Rows sum to 1; nan for a class without samples. None without labels.
        mutual_information: I(class; top expert), plug-in estimate; log C for perfect specialists. None without labels.
        mutual_information_corrected: The same with Miller's bias correction.
        mutual_information_stderr: Standard error of both, over samples.
        soft: Whether the router mixes all experts.
        num_rows: Rows (samples, or their tokens) that were routed.
        num_nonfinite: Rows with nan or inf logits, counted in nothing else.
    """

    load: Tensor
    importance: Tensor
    entropy: float
    entropy_of_mean: float
    effective_experts: float
    dead_experts: tuple[int, ...]
    class_map: Tensor | None
    mutual_information: float | None
    mutual_information_corrected: float | None
    mutual_information_stderr: float | None
    soft: bool
    num_rows: int
    num_nonfinite: int

    @property
    def load_cv(self) -> float:
        """Coefficient of variation of the load (population): 0 when even, √(E - 1) when one expert has all."""
        return float(self.load.std(correction=0) / self.load.mean())

    @property
    def max_violation(self) -> float:
        r"""MaxVio, :math:`E \max_e \text{load}_e - 1`: 0 when even, E - 1 when one expert has all. arXiv 2408.15664."""
        return float(self.load.max()) * len(self.load) - 1

    def metrics(self) -> dict[str, float]:
        """The numbers to log."""
        values = {
            "entropy": self.entropy,
            "entropy_of_mean": self.entropy_of_mean,
            "effective_experts": self.effective_experts,
            "num_dead_experts": float(len(self.dead_experts)),
            "load_min": float(self.load.min()),
            "load_max": float(self.load.max()),
            "load_cv": self.load_cv,
            "max_violation": self.max_violation,
            "mutual_information": self.mutual_information,
            "mutual_information_corrected": self.mutual_information_corrected,
            "mutual_information_stderr": self.mutual_information_stderr,
            "num_rows": float(self.num_rows),
            "num_nonfinite": float(self.num_nonfinite),
        }
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True, eq=False)
class ExpertUtilizationResult:
    """Expert utilisation of every head of a model that has a router and ran; the properties give one quantity by head.

    Attributes:
        heads: Utilisation by the name of the head ("head" when the model is itself the head); empty for a model without
            a router, which is no error: a dense head has none.
        class_names: Names of the C classes; empty without labels.
        num_samples: Samples of the data.
    """

    heads: dict[str, HeadUtilization]
    class_names: tuple[str, ...]
    num_samples: int

    @property
    def load(self) -> dict[str, Tensor]:
        """Load of each head, (E,)."""
        return {name: head.load for name, head in self.heads.items()}

    @property
    def importance(self) -> dict[str, Tensor]:
        """Importance of each head, (E,)."""
        return {name: head.importance for name, head in self.heads.items()}

    @property
    def entropy(self) -> dict[str, float]:
        """Mean entropy of a row's softmax of each head, nats."""
        return {name: head.entropy for name, head in self.heads.items()}

    @property
    def class_map(self) -> dict[str, Tensor | None]:
        """Class map of each head, (C, E); None without labels."""
        return {name: head.class_map for name, head in self.heads.items()}

    @property
    def mutual_information(self) -> dict[str, float | None]:
        """Plug-in I(class; top expert) of each head, nats; None without labels."""
        return {name: head.mutual_information for name, head in self.heads.items()}

    @property
    def dead_experts(self) -> dict[str, tuple[int, ...]]:
        """Dead experts of each head."""
        return {name: head.dead_experts for name, head in self.heads.items()}

    def metrics(self) -> dict[str, float]:
        """The numbers to log, ``<head>/<quantity>``; empty for a model without a router."""
        return {f"{name}/{key}": value for name, head in self.heads.items() for key, value in head.metrics().items()}

    def plot(self, ax: "Axes | None" = None, head: str | None = None) -> "tuple[Figure, Axes]":
        """Heat map of classes by experts of one head, below bars of load and importance.

        Args:
            ax: Axes for the heat map alone (for the bars, without labels); by default those of a new figure that pyplot
                does not know, with both.
            head: Name of the head; by default the first.

        Raises:
            ValueError: If there is no such head.
        """
        from moe_heads.callbacks.functional.utilization.figure import plot_utilization

        name = next(iter(self.heads), "head") if head is None else head
        if name not in self.heads:
            raise ValueError(f"head: expected one of {list(self.heads)}; got {name!r}")
        return plot_utilization(name, self.heads[name], self.class_names, ax)

    def summary(self) -> str:
        """Markdown table with one column a head."""
        if not self.heads:
            return "No router of moe_heads ran in this model: there are no experts to report on."
        columns = {name: head.metrics() for name, head in self.heads.items()}
        names = list(columns)
        rows = [
            f"| {quantity.replace('_', ' ')} | {' | '.join(f'{columns[name][quantity]:.4g}' for name in names)} |"
            for quantity in next(iter(columns.values()))
        ]
        dead = [
            f"\nDead in {name}: {len(head.dead_experts)} of {len(head.load)} experts, number "
            f"{', '.join(map(str, head.dead_experts))}."
            for name, head in self.heads.items()
            if head.dead_experts
        ]
        table = [f"| quantity | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|", *rows]
        return "\n".join([*table, f"\n{self.num_samples} samples; entropies and information in nats.", *dead])

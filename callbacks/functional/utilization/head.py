"""How the experts of one head are used."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["HeadUtilization"]


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

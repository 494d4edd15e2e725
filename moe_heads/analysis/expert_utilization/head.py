"""How the experts of one head are used."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_heads.analysis.expert_utilization.ablation import ExpertAblation
from moe_heads.analysis.expert_utilization.examples import ExpertExamples

__all__ = ["HeadUtilization", "dead_and_starved", "relative_load_percentiles"]

_PERCENTILES = (10, 50, 90)


def relative_load_percentiles(load: Tensor) -> dict[str, float]:
    """10th, 50th and 90th percentile of loads in units of the fair share, (E,): all 1 when even."""
    levels = torch.tensor(_PERCENTILES, dtype=torch.float64) / 100
    found = torch.quantile(load.double(), levels).tolist()
    return {f"relative_load_p{level}": value for level, value in zip(_PERCENTILES, found, strict=True)}


def dead_and_starved(
    relative: Sequence[float], dead_below: float, starved_below: float
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Experts that are dead, and those that are not and starve.

    Args:
        relative: Share of each expert in units of the fair share.
        dead_below: Below it, or without anything, an expert is dead.
        starved_below: Below it one starves.
    """
    dead = tuple(expert for expert, share in enumerate(relative) if share == 0 or share < dead_below)
    return dead, tuple(e for e, share in enumerate(relative) if share < starved_below and e not in dead)


@dataclass(frozen=True, eq=False)
class HeadUtilization:
    r"""How the experts of one head are used. Entropies and mutual information in nats; tensors float64 on the CPU.

    Attributes:
        load: Share of the choices that went to each expert, (E,). A soft router chooses its largest gate.
        importance: Share of the mixing weight that went to each expert, (E,).
        entropy: Mean entropy of a row's full softmax: near 0 for a decided router, log E for one that mixes evenly.
        entropy_of_mean: Entropy of the mean softmax: log E when the experts are used evenly over the data.
        effective_experts: :math:`\exp H(\text{importance})`, 1 to E: how many experts the data use. On one scale for
            soft and sparse routers.
        effective_experts_per_row: :math:`\exp` of the mean entropy of a row's gates: how many experts a row mixes; 1
            for k = 1, at most k for a sparse router, at most E for a soft one.
        margin: Mean distance of a row's choice from another one, in the unit of the scores that the router compares;
            infinite where there is no other choice.
        dropped: Share of the rows that no expert took.
        dead_experts: Experts with less than ``dead_below`` of the fair share 1/E of the load; of the importance, for a
            soft router.
        starved_experts: Those that are not dead and have less than ``starved_below`` of it.
        coactivation: Share of the rows of expert i that chose expert j too, (E, E); the diagonal is 1, a row of an
            expert without rows nan. None where every row has one expert, or all.
        class_map: Share of the mixing weight that the samples of a class gave to each expert, (C, E); where gates sum
            to one, their mean. Rows sum to 1; nan for a class without samples. None without labels.
        class_counts: Choices of each expert by the rows of each class, (C, E), int64; a soft router chooses its largest
            gate. None without labels.
        mutual_information: I(class; expert) of a choice, plug-in estimate; log C for perfect specialists. None without
            labels.
        mutual_information_corrected: The same with Miller's bias correction, for choices of a sample that depend on one
            another.
        mutual_information_stderr: Standard error of both, over samples.
        mutual_information_by_chance: Mean of the plug-in estimate with permuted labels; None without permutations.
        mutual_information_p_value: Share of the permutations with at least as much as was found.
        soft: Whether the router mixes all experts.
        num_rows: Rows (samples, or their tokens) that were routed.
        num_choices: Pairs of a row and an expert that was chosen for it, the sum behind ``load``.
        num_nonfinite: Rows with nan or inf logits, counted in nothing else.
        ablation: What the accuracy loses without each expert; None if it was not asked for or no expert can be spared.
        examples: Images that each expert received with the highest gate; None without images.
    """

    load: Tensor
    importance: Tensor
    entropy: float
    entropy_of_mean: float
    effective_experts: float
    effective_experts_per_row: float
    margin: float
    dropped: float
    dead_experts: tuple[int, ...]
    starved_experts: tuple[int, ...]
    coactivation: Tensor | None
    class_map: Tensor | None
    class_counts: Tensor | None
    mutual_information: float | None
    mutual_information_corrected: float | None
    mutual_information_stderr: float | None
    mutual_information_by_chance: float | None
    mutual_information_p_value: float | None
    soft: bool
    num_rows: int
    num_choices: int
    num_nonfinite: int
    ablation: ExpertAblation | None = None
    examples: ExpertExamples | None = None

    @property
    def load_cv(self) -> float:
        """Coefficient of variation of the load (population): 0 when even, √(E - 1) when one expert has all."""
        return float(self.load.std(correction=0) / self.load.mean())

    @property
    def max_violation(self) -> float:
        r"""MaxVio, :math:`E \max_e \text{load}_e - 1`: 0 when even, E - 1 when one expert has all. arXiv 2408.15664."""
        return float(self.load.max()) * len(self.load) - 1

    @property
    def relative_load(self) -> Tensor:
        """Load in units of the fair share 1/E, (E,)."""
        return self.load * len(self.load)

    @property
    def specialization(self) -> Tensor | None:
        r"""How far the classes of an expert are from those of all: :math:`KL(p(c|e) \| p(c))`, (E,), nats.

        0 for an expert that sees the classes as they come, :math:`-\log p(c)` for one that sees class c alone, nan for
        one without a choice. Weighted by the load, it sums to ``mutual_information``. None without labels.
        """
        if self.class_counts is None:
            return None
        counts = self.class_counts.double()
        of_all = counts.sum(1, keepdim=True) / counts.sum()
        of_expert = counts / counts.sum(0, keepdim=True)
        terms = torch.where(of_expert > 0, of_expert * (of_expert / of_all).log(), of_expert)
        return terms.sum(0)

    def metrics(self) -> dict[str, float]:
        """The numbers to log."""
        values = {
            "entropy": self.entropy,
            "entropy_of_mean": self.entropy_of_mean,
            "effective_experts": self.effective_experts,
            "effective_experts_per_row": self.effective_experts_per_row,
            "num_dead_experts": float(len(self.dead_experts)),
            "num_starved_experts": float(len(self.starved_experts)),
            "load_min": float(self.load.min()),
            "load_max": float(self.load.max()),
            "load_cv": self.load_cv,
            "max_violation": self.max_violation,
            **relative_load_percentiles(self.relative_load),
            "margin": self.margin,
            "dropped": self.dropped,
            "mutual_information": self.mutual_information,
            "mutual_information_corrected": self.mutual_information_corrected,
            "mutual_information_stderr": self.mutual_information_stderr,
            "mutual_information_by_chance": self.mutual_information_by_chance,
            "mutual_information_p_value": self.mutual_information_p_value,
            "num_rows": float(self.num_rows),
            "num_nonfinite": float(self.num_nonfinite),
        }
        # the margin is infinite where there is no other choice
        return {key: value for key, value in values.items() if value is not None and math.isfinite(value)}

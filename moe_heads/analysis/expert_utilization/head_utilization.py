"""Utilization of the experts of one head."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_heads.analysis.expert_utilization.ablation import ExpertAblation
from moe_heads.analysis.expert_utilization.examples import ExpertExamples

__all__ = ["Detail", "HeadUtilization", "dead_and_starved", "relative_load_percentiles"]

Detail = Literal["summary", "full"]
"""Amount of the output: what shows the state of the model, or everything."""

_PERCENTILES = (10, 50, 90)

# Numbers that the summary leaves out. Each follows from others, belongs to another one in the tables, or is a constant.
_ONLY_IN_FULL = (
    "entropy_of_mean",
    "load_min",
    "load_max",
    *(f"relative_load_p{level}" for level in _PERCENTILES),
    "margin",
    "mutual_information_corrected",
    "mutual_information_stderr",
    "mutual_information_p_value",
    "num_rows",
    "num_nonfinite",
)


def relative_load_percentiles(load: Tensor) -> dict[str, float]:
    """Compute the 10th, 50th and 90th percentile of loads (E,) in units of the fair share: all 1 for an even load."""
    levels = torch.tensor(_PERCENTILES, dtype=torch.float64) / 100
    found = torch.quantile(load.double(), levels).tolist()
    return {f"relative_load_p{level}": value for level, value in zip(_PERCENTILES, found, strict=True)}


def dead_and_starved(
    relative: Sequence[float], dead_below: float, starved_below: float
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the dead experts, and the starved experts that are not dead.

    Args:
        relative: Share of each expert in units of the fair share.
        dead_below: Bound below which an expert is dead. An expert with a share of 0 is always dead.
        starved_below: Bound below which an expert is starved.
    """
    dead = tuple(expert for expert, share in enumerate(relative) if share == 0 or share < dead_below)
    return dead, tuple(e for e, share in enumerate(relative) if share < starved_below and e not in dead)


@dataclass(frozen=True, eq=False)
class HeadUtilization:
    r"""Utilization of the experts of one head. Entropies and mutual information in nats, tensors float64 on the CPU.

    Attributes:
        load: Fraction of the choices assigned to each expert, (E,). A soft router chooses its largest gate.
        importance: Fraction of the mixing weight of each expert, (E,).
        entropy: Mean entropy of the full softmax of a row. It is near 0 for a confident router and log E for a uniform
            mixture. nan if the softmax of the router is unknown.
        entropy_of_mean: Entropy of the mean softmax. It is log E if the experts are used evenly over the data. nan if
            unknown.
        effective_experts: :math:`\exp H(\text{importance})`, the effective number of experts in use, 1 to E. It is
            comparable between soft and sparse routers.
        effective_experts_per_row: :math:`\exp` of the mean entropy of the gates of a row, the effective number of
            experts that a row mixes. It is 1 for k = 1, at most k for a sparse router, and at most E for a soft one.
        margin: Mean distance of a row from a different choice, in the unit of the scores that the router compares.
            Infinite if there is no other choice, nan if unknown.
        dropped: Fraction of the rows that no expert took.
        dead_experts: Experts with less than ``dead_below`` of the fair share 1/E of the load. For a soft router the
            importance is compared instead.
        starved_experts: Experts that are not dead and have less than ``starved_below`` of the fair share.
        coactivation: Fraction of the rows of expert i that also chose expert j, (E, E). The diagonal is 1, and the row
            of an expert without rows is nan. None if every row has one expert, or all.
        class_map: Share of the mixing weight of the samples of a class on each expert, (C, E). It is the mean gate if
            gates sum to one. Rows sum to 1, and are nan for a class without samples. None without labels.
        class_counts: Number of choices of each expert by the rows of each class, (C, E), int64. A soft router chooses
            its largest gate. None without labels.
        mutual_information: I(class; expert) of a choice, plug-in estimate. It is log C for perfect specialists. None
            without labels.
        mutual_information_corrected: The same with the bias correction of Miller, for dependent choices of a sample.
        mutual_information_stderr: Standard error of both, over samples.
        mutual_information_by_chance: Mean of the plug-in estimate with permuted labels. None without permutations.
        mutual_information_p_value: Fraction of the permutations with at least the estimated value.
        soft: Whether the router mixes all experts.
        num_rows: Number of routed rows (samples, or their tokens).
        num_choices: Number of pairs of a row and its chosen expert, the denominator of ``load``.
        num_nonfinite: Number of rows with nan or infinite logits. No other quantity includes them.
        ablation: Accuracy lost without each expert. None if it was not requested or no expert can be removed.
        examples: Images that each expert received with the highest gate. None without images.
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
        """Coefficient of variation of the load (population): 0 if even, √(E - 1) if one expert has all of it."""
        return float(self.load.std(correction=0) / self.load.mean())

    @property
    def max_violation(self) -> float:
        r"""MaxVio, :math:`E \max_e \text{load}_e - 1`: 0 if even, E - 1 if one expert has all. arXiv 2408.15664."""
        return float(self.load.max()) * len(self.load) - 1

    @property
    def relative_load(self) -> Tensor:
        """Load in units of the fair share 1/E, (E,)."""
        return self.load * len(self.load)

    @property
    def specialization(self) -> Tensor | None:
        r"""Divergence of the classes of an expert from those of all data, :math:`KL(p(c|e) \| p(c))`, (E,), nats.

        It is 0 for an expert with the overall class frequencies, :math:`-\log p(c)` for an expert with class c only,
        and nan for an expert without a choice. The mean weighted by the load is ``mutual_information``. None without
        labels.
        """
        if self.class_counts is None:
            return None
        counts = self.class_counts.double()
        of_all = counts.sum(1, keepdim=True) / counts.sum()
        of_expert = counts / counts.sum(0, keepdim=True)
        terms = torch.where(of_expert > 0, of_expert * (of_expert / of_all).log(), of_expert)
        return terms.sum(0)

    def quantities(self) -> dict[str, float]:
        """Return all numbers that apply to this head. nan marks an unknown one."""
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
        # the margin is infinite if there is no other choice
        return {key: value for key, value in values.items() if value is not None and not math.isinf(value)}

    def metrics(self, detail: Detail = "full") -> dict[str, float]:
        """Return the numbers to log, without unknown ones.

        Args:
            detail: "full" for all numbers, "summary" for those that are worth a chart.
        """
        known = {key: value for key, value in self.quantities().items() if not math.isnan(value)}
        return known if detail == "full" else {key: known[key] for key in known if key not in _ONLY_IN_FULL}

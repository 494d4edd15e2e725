"""What the mutual information of class and expert would be by chance: labels dealt out anew among the samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_heads.analysis.expert_utilization.mutual_information import mutual_information

__all__ = ["PermutationBaseline", "permutation_baseline"]


@dataclass(frozen=True)
class PermutationBaseline:
    """The plug-in mutual information under permuted labels, in nats.

    Attributes:
        mean: Its mean: what independent classes and experts show in so many samples.
        p_value: Share of the permutations, the true labels counted among them, with at least as much as was found; at
            least 1 / (permutations + 1).
    """

    mean: float
    p_value: float


def permutation_baseline(
    labels: Tensor, chosen: Tensor, num_classes: int, num_permutations: int, seed: int
) -> PermutationBaseline:
    """Permutation test of I(class; expert): classes and experts independent, with the frequencies of both as found.

    The labels of whole samples are permuted, so that tokens of one sample stay together. The order of the samples does
    not matter: they are sorted first, so that the ranks of a distributed run may hold any part of them.

    Args:
        labels: Class of each sample, (B,).
        chosen: Choices of each expert by each sample, (B, E), whole numbers.
        num_classes: C.
        num_permutations: Permutations.
        seed: Seed of the permutations; the global generator is not touched.

    Source:
        Phipson and Smyth, arXiv 1603.05766, for the p-value.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.expert_utilization.permutation import permutation_baseline
        >>> labels = torch.arange(2).repeat(50)
        >>> permutation_baseline(labels, torch.eye(2, dtype=torch.int64)[labels], 2, 99, seed=0).p_value
        0.01
    """
    generator = torch.Generator().manual_seed(seed)
    patterns, repeats = torch.cat([labels.unsqueeze(1), chosen], 1).unique(dim=0, return_counts=True)
    patterns = patterns.repeat_interleave(repeats, 0)
    labels, chosen = patterns[:, 0], patterns[:, 1:].double()

    def information(permuted: Tensor) -> float:
        counts = torch.zeros(num_classes, chosen.shape[1], dtype=torch.float64).index_add_(0, permuted, chosen)
        return mutual_information(counts).plugin

    found = information(labels)
    by_chance = torch.tensor(
        [information(labels[torch.randperm(len(labels), generator=generator)]) for _ in range(num_permutations)],
        dtype=torch.float64,
    )
    # equal tables differ by rounding
    num_as_large = int((by_chance >= found - 1e-12).sum())
    return PermutationBaseline(float(by_chance.mean()), (1 + num_as_large) / (1 + num_permutations))

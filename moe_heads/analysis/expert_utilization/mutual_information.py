"""Mutual information of two discrete variables from their joint counts, with a permutation test."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "MIN_GROUPS",
    "MutualInformation",
    "PermutationBaseline",
    "information_of_groups",
    "information_of_samples",
    "mutual_information",
    "permutation_baseline",
]

MIN_GROUPS = 8
"""Smallest number of groups of `information_of_groups`: its standard error is then uncertain by about a quarter."""


@dataclass(frozen=True)
class MutualInformation:
    """Estimates of I(X; Y), in nats.

    Attributes:
        plugin: I of the observed frequencies. It is never negative, and too large by about
            (rows - 1)(columns - 1) / 2N for independent variables.
        corrected: The same with the bias correction of the entropies after Miller, or of the jackknife. It may be
            slightly negative.
        stderr: Standard error of both by the delta method, for N independent observations, or by the jackknife.
    """

    plugin: float
    corrected: float
    stderr: float


def mutual_information(counts: Tensor) -> MutualInformation:
    r"""Estimate the mutual information :math:`I(X;Y) = \sum_{xy} p_{xy} \log \frac{p_{xy}}{p_x p_y}` from joint counts.

    The correction of Miller adds (m - 1) / 2N to an entropy of m nonempty cells, so
    :math:`I + (m_X + m_Y - m_{XY} - 1) / 2N` is the corrected estimate.

    Args:
        counts: Observations in each cell, (X, Y), integers.

    Returns:
        Both estimates and their standard error, which are zeros for an empty table.

    Raises:
        ValueError: If the counts are not a matrix or a count is negative.

    Source:
        Miller, Note on the bias of information estimates, 1955; Roulston, Estimating the errors on measured entropy and
        mutual information, 1999.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.expert_utilization.mutual_information import mutual_information
        >>> round(mutual_information(torch.tensor([[50, 0], [0, 50]])).plugin, 4)  # log 2
        0.6931
    """
    if counts.dim() != 2 or bool((counts < 0).any()):
        got = f"shape {tuple(counts.shape)}" if counts.dim() != 2 else f"{int(counts.min())}"
        raise ValueError(f"counts: expected a matrix of counts of at least 0, got {got}.")
    table = counts.to(torch.float64)
    total = float(table.sum())
    if total == 0:
        return MutualInformation(0.0, 0.0, 0.0)
    joint = table / total
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    # an empty cell adds nothing, for any marginals
    information = torch.where(joint > 0, (joint / independent).log(), 0)
    plugin = float((joint * information).sum())
    variance = float((joint * (information - plugin).square()).sum())
    nonempty = [int((cells > 0).sum()) for cells in (joint.sum(1), joint.sum(0), joint)]
    correction = (nonempty[0] + nonempty[1] - nonempty[2] - 1) / (2 * total)
    return MutualInformation(max(plugin, 0.0), plugin + correction, (variance / total) ** 0.5)


def information_of_samples(labels: Tensor, chosen: Tensor, num_classes: int) -> MutualInformation:
    r"""Estimate I(class; expert) of a random choice if each sample makes several dependent choices.

    The correction of `mutual_information` counts every choice as an observation. It is multiplied by the dispersion of
    the choices of a sample relative to independent ones. The factor is larger for equal tokens and smaller for k
    different experts:

    .. math:: \frac{1}{E - 1} \sum_e \frac{\mathrm{Var}(t_e)}{\mathrm{mean}(t_e)},

    where :math:`t_e` is the number of choices of expert e by a sample. It is 1 for one choice per sample and T for T
    equal tokens. The standard error is that of the delta method over samples.

    Args:
        labels: Class of each sample, (B,).
        chosen: Number of choices of each expert by each sample, (B, E), integers.
        num_classes: C.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.expert_utilization.mutual_information import information_of_samples
        >>> labels = torch.arange(2).repeat(50)
        >>> round(information_of_samples(labels, torch.eye(2, dtype=torch.int64)[labels], 2).plugin, 4)  # log 2
        0.6931
    """
    counts = torch.zeros(num_classes, chosen.shape[1], dtype=torch.float64).index_add_(0, labels, chosen.double())
    found, total = mutual_information(counts), float(counts.sum())
    if total == 0:
        return found
    mean, variance = chosen.double().mean(0), chosen.double().var(0, correction=0)
    used = mean > 0
    spread = float((variance[used] / mean[used]).sum()) / max(int(used.sum()) - 1, 1)
    joint = counts / total
    information = torch.where(joint > 0, (joint / (joint.sum(1, keepdim=True) * joint.sum(0))).log(), 0)
    of_sample = (chosen * (information[labels] - found.plugin)).sum(1) / total
    corrected = found.plugin + spread * (found.corrected - found.plugin)
    return MutualInformation(found.plugin, corrected, float(of_sample.square().sum()) ** 0.5)


def information_of_groups(counts: Tensor) -> MutualInformation:
    r"""Estimate I(class; expert) of a random choice, with bias and error by the jackknife over groups of samples.

    For rows with classes of their own, such as tokens, of which those of one sample depend on each other. With the
    estimate :math:`I`, the estimate :math:`I_{-g}` without the :math:`n_g` choices of group g, and
    :math:`h_g = n / n_g`, the corrected estimate and its variance are

    .. math::

        J = G I - \sum_g \left(1 - \frac{1}{h_g}\right) I_{-g}, \qquad
        \frac{1}{G} \sum_g \frac{(h_g I - (h_g - 1) I_{-g} - J)^2}{h_g - 1}.

    Args:
        counts: Number of choices of each expert by the rows of each class, by group, (G, C, E), integers. Groups must
            hold random samples, each of them in one group only.

    Raises:
        ValueError: If fewer than eight groups are not empty.

    Source:
        Busing, Meijer and van der Leeden, Delete-m jackknife for unequal m, 1999.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.expert_utilization.mutual_information import information_of_groups
        >>> counts = torch.tensor([[5, 0], [0, 5]]).repeat(16, 1, 1)
        >>> round(information_of_groups(counts).corrected, 4)  # log 2
        0.6931
    """
    total = counts.sum(0)
    plugin = mutual_information(total).plugin
    parts = counts[counts.flatten(1).any(1)]
    if len(parts) < MIN_GROUPS:
        raise ValueError(f"counts: expected at least {MIN_GROUPS} groups with choices, got {len(parts)}.")
    without = torch.tensor([mutual_information(total - part).plugin for part in parts], dtype=torch.float64)
    ratio = total.sum().double() / parts.sum((1, 2))
    corrected = float(len(parts) * plugin - ((1 - 1 / ratio) * without).sum())
    deviations = ratio * plugin - (ratio - 1) * without - corrected
    return MutualInformation(plugin, corrected, float((deviations.square() / (ratio - 1)).mean()) ** 0.5)


@dataclass(frozen=True)
class PermutationBaseline:
    """Plug-in mutual information under permuted labels, in nats.

    Attributes:
        mean: Its mean, the value to expect for independent classes and experts with this number of samples.
        p_value: Fraction of the permutations, including the true labels, with at least the observed value. It is at
            least 1 / (permutations + 1).
    """

    mean: float
    p_value: float


def permutation_baseline(
    labels: Tensor, chosen: Tensor, num_classes: int, num_permutations: int, seed: int
) -> PermutationBaseline:
    """Run a permutation test of I(class; expert) against independence with the observed frequencies of both.

    The labels of whole samples are permuted, so that tokens of one sample stay together. The result does not depend on
    the order of the samples, which are sorted first. So the ranks of a distributed run may hold any part of them.

    Args:
        labels: Class of each sample, (B,).
        chosen: Number of choices of each expert by each sample, (B, E), integers.
        num_classes: C.
        num_permutations: Number of permutations.
        seed: Seed of the permutations. The global generator is not used.

    Source:
        Phipson and Smyth, arXiv 1603.05766, for the p-value.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.expert_utilization.mutual_information import permutation_baseline
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
    # equal tables may differ by rounding
    num_as_large = int((by_chance >= found - 1e-12).sum())
    return PermutationBaseline(float(by_chance.mean()), (1 + num_as_large) / (1 + num_permutations))

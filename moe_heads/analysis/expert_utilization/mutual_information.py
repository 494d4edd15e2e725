"""Mutual information of two discrete variables from their joint counts."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MutualInformation", "information_of_samples", "mutual_information"]


@dataclass(frozen=True)
class MutualInformation:
    """Estimates of I(X; Y), in nats.

    Attributes:
        plugin: I of the observed frequencies. Never negative, and too large by about
            (rows - 1)(columns - 1) / 2N for independent variables.
        corrected: The same with the bias of the entropies corrected after Miller; may be slightly negative.
        stderr: Standard error of both by the delta method, for N independent observations.
    """

    plugin: float
    corrected: float
    stderr: float


def mutual_information(counts: Tensor) -> MutualInformation:
    r"""Mutual information :math:`I(X;Y) = \sum_{xy} p_{xy} \log \frac{p_{xy}}{p_x p_y}` from joint counts.

    Miller's correction adds (m - 1) / 2N to an entropy of m prepared cells, so
    :math:`I + (m_X + m_Y - m_{XY} - 1) / 2N` is the corrected estimate.

    Args:
        counts: Observations in each cell, (X, Y), whole numbers.

    Returns:
        Both estimates and their standard error; zeros for an empty table.

    Raises:
        ValueError: If the counts are not a matrix or one is negative.

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
        raise ValueError(f"counts: expected a matrix of counts from 0 on, got shape {tuple(counts.shape)}")
    table = counts.to(torch.float64)
    total = float(table.sum())
    if total == 0:
        return MutualInformation(0.0, 0.0, 0.0)
    joint = table / total
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    # an empty cell adds nothing, whatever its marginals
    information = torch.where(joint > 0, (joint / independent).log(), 0)
    plugin = float((joint * information).sum())
    variance = float((joint * (information - plugin).square()).sum())
    prepared = [int((cells > 0).sum()) for cells in (joint.sum(1), joint.sum(0), joint)]
    correction = (prepared[0] + prepared[1] - prepared[2] - 1) / (2 * total)
    return MutualInformation(max(plugin, 0.0), plugin + correction, (variance / total) ** 0.5)


def information_of_samples(labels: Tensor, chosen: Tensor, num_classes: int) -> MutualInformation:
    r"""I(class; expert) of a random choice, where a sample makes several that are not independent.

    The correction of `mutual_information` counts every choice as an observation. It is multiplied by how much more
    (equal tokens) or less (k different experts) the choices of a sample spread than independent ones,

    .. math:: \frac{1}{E - 1} \sum_e \frac{\mathrm{Var}(t_e)}{\mathrm{mean}(t_e)},

    :math:`t_e` being the choices of expert e by a sample: 1 for one choice a sample, T for T equal tokens. The standard
    error is that of the delta method over samples.

    Args:
        labels: Class of each sample, (B,).
        chosen: Choices of each expert by each sample, (B, E), whole numbers.
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

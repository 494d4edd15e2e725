"""Mutual information of two discrete variables from their joint counts."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MutualInformation", "mutual_information"]


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

    Miller's correction adds (m - 1) / 2N to an entropy of m occupied cells, so
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
        >>> from moe_heads.callbacks.functional.utilization.mutual_information import mutual_information
        >>> round(mutual_information(torch.tensor([[50, 0], [0, 50]])).plugin, 4)  # log 2
        0.6931
    """
    if counts.dim() != 2 or bool((counts < 0).any()):
        raise ValueError(f"counts: expected a matrix of counts from 0 on; got shape {tuple(counts.shape)}")
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
    occupied = [int((cells > 0).sum()) for cells in (joint.sum(1), joint.sum(0), joint)]
    correction = (occupied[0] + occupied[1] - occupied[2] - 1) / (2 * total)
    return MutualInformation(max(plugin, 0.0), plugin + correction, (variance / total) ** 0.5)

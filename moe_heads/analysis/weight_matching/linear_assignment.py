"""Linear assignment problem: the permutation with the largest sum of similarities."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["best_assignment"]


def best_assignment(similarity: Tensor) -> tuple[Tensor, float]:
    """Return the column of each row in the assignment with the largest sum, and the sum.

    Args:
        similarity: (n, n), float64 on the CPU.

    Returns:
        The columns, (n,), int64, and the sum.

    Raises:
        ValueError: If a number is not finite.

    Example:
        >>> import torch
        >>> best_assignment(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
        (tensor([1, 0]), 3.0)
    """
    if not bool(similarity.isfinite().all()):
        raise ValueError("weights: expected finite numbers, got nan or infinity. Check the checkpoint.")
    _, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
    chosen = torch.from_numpy(columns).long()
    return chosen, float(similarity.gather(1, chosen.unsqueeze(1)).sum())

"""Balance losses, which encourage a router to use every expert.

Shapes: N rows, E experts, K chosen experts per row. ``valid`` (N,) marks the rows that count: the value of a loss does
not depend on a row whose logits are not finite. The gradient of such a batch is not finite, like that of the task
loss. Each loss is a ratio of sums over rows. With ``sync`` the sums are taken over all ranks of the default process
group before the ratio, so that the result is the loss of the global batch.
"""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["importance_loss", "kl_uniform_loss", "load_loss", "selection_probability", "switch_loss", "z_loss"]

_TINY = 1e-12


def importance_loss(gates: Tensor, valid: Tensor, sync: bool = False) -> Tensor:
    r"""Return the squared coefficient of variation of the experts' importance, :math:`CV^2(\sum_n G_{n,e})`.

    The variance is the population variance (divided by E, not E - 1). The loss is 0 when all experts have equal
    importance and E - 1 when one expert has all of it. Shazeer et al., arXiv 1701.06538, section 4.

    Args:
        gates: Mixing weights, (N, E), zero where an expert was not chosen.
        valid: Rows that count, (N,).
        sync: Sum over the ranks first.

    Returns:
        Scalar.
    """
    return _squared_cv(_sum_rows(gates, valid, sync))


def load_loss(
    logits: Tensor, noisy_logits: Tensor, noise_std: Tensor, k: int, valid: Tensor, sync: bool = False
) -> Tensor:
    r"""Return the squared coefficient of variation of the smooth load, :math:`CV^2(\sum_n P(n,e))`.

    P is `selection_probability`. The variance is the population variance, as in `importance_loss`. Shazeer et al.,
    arXiv 1701.06538, appendix A.

    Args:
        logits: Clean router logits, (N, E).
        noisy_logits: Logits with the sampled noise, (N, E).
        noise_std: Standard deviation of the noise, (N, E).
        k: Number of experts chosen per row.
        valid: Rows that count, (N,).
        sync: Sum over the ranks first.

    Returns:
        Scalar.
    """
    return _squared_cv(_sum_rows(selection_probability(logits, noisy_logits, noise_std, k), valid, sync))


def selection_probability(logits: Tensor, noisy_logits: Tensor, noise_std: Tensor, k: int) -> Tensor:
    r"""Return the probability that a row chooses an expert when only the noise of that expert is resampled.

    .. math:: P(n,e) = \Phi\big((z_{n,e} - \text{kth largest of } \tilde z_n \text{ without } e) / \sigma_{n,e}\big)

    Args:
        logits: Clean router logits z, (N, E).
        noisy_logits: Logits with the sampled noise, (N, E).
        noise_std: Standard deviation of the noise, (N, E).
        k: Number of experts chosen per row.

    Returns:
        Probabilities, (N, E). They are ones when k = E.
    """
    if k == logits.shape[-1]:
        return torch.ones_like(logits)
    values = noisy_logits.topk(k + 1, dim=-1).values
    kth, next_best = values[..., k - 1 : k], values[..., k:]
    # without e, the k-th largest is the (k+1)-th of all if e itself is among the first k
    threshold = torch.where(noisy_logits >= kth, next_best, kth)
    probability: Tensor = torch.special.ndtr((logits - threshold) / noise_std.clamp_min(1e-6))
    return probability


def switch_loss(probs: Tensor, counts: Tensor, valid: Tensor, sync: bool = False) -> Tensor:
    r"""Return the Switch / GShard loss :math:`E \sum_e f_e P_e`, which is 1 when f and P are uniform.

    f is the fraction of the choices that an expert received (no gradient), and P is the mean of the full softmax.
    Fedus et al., arXiv 2101.03961, equation 4.

    Args:
        probs: Full softmax over the experts, (N, E).
        counts: One-hot sum of the choices of a row, (N, E).
        valid: Rows that count, (N,).
        sync: Sum over the ranks first.

    Returns:
        Scalar.
    """
    chosen = _sum_rows(counts.detach().to(probs.dtype), valid, sync)
    mass = _sum_rows(probs, valid, sync)
    return probs.shape[-1] * (_normalized(chosen) * _normalized(mass)).sum()


def z_loss(logits: Tensor, valid: Tensor, sync: bool = False) -> Tensor:
    r"""Return the router z-loss :math:`\frac1N \sum_n \log^2 \sum_e e^{z_{n,e}}`, which keeps the logits small.

    Zoph et al. (ST-MoE), arXiv 2202.08906, equation 5.

    Args:
        logits: Clean router logits, (N, E).
        valid: Rows that count, (N,).
        sync: Sum over the ranks first.

    Returns:
        Scalar.
    """
    total = _sum_rows(logits.logsumexp(-1, keepdim=True).square(), valid, sync)
    return (total / _sum_over_ranks(valid.sum(), sync).clamp_min(1)).squeeze()


def kl_uniform_loss(gates: Tensor, valid: Tensor, sync: bool = False) -> Tensor:
    r"""Return the divergence of the mean gate from uniform.

    .. math:: KL(\bar g \| u) = \log E + \sum_e \bar g_e \log \bar g_e

    It is 0 when the mean gate is uniform and log E when one expert has all the weight. Unit: nats.

    Args:
        gates: Gates that sum to one over the experts, (N, E).
        valid: Rows that count, (N,).
        sync: Sum over the ranks first.

    Returns:
        Scalar.
    """
    mean = _normalized(_sum_rows(gates, valid, sync))
    divergence = (mean * (mean.clamp_min(_TINY) * gates.shape[-1]).log()).sum()
    # an empty batch has no mean gate and no imbalance
    return torch.where(mean.sum() > 0, divergence, torch.zeros_like(divergence))


def _squared_cv(sums: Tensor) -> Tensor:
    return sums.var(correction=0) / sums.mean().square().clamp_min(_TINY)


def _normalized(sums: Tensor) -> Tensor:
    return sums / sums.sum().clamp_min(_TINY)


def _sum_rows(values: Tensor, valid: Tensor, sync: bool) -> Tensor:
    return _sum_over_ranks(values.masked_fill(~valid.unsqueeze(-1), 0).sum(0), sync)


def _sum_over_ranks(sums: Tensor, sync: bool) -> Tensor:
    """Sum over the ranks. The gradient, averaged over the ranks as DDP does, is that of the global loss."""
    if not (sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return sums
    total = sums.detach().clone()
    dist.all_reduce(total)
    # DDP divides the summed gradients by the number of ranks, so the local part is scaled up by the same factor
    return total + dist.get_world_size() * (sums - sums.detach())

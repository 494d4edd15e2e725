"""Noisy top-k gate of Shazeer et al., arXiv 1701.06538."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.routers.linear import Gate, LinearRouter, check_chosen, linear_fp32
from moe_heads.routing import Routing

__all__ = ["NoisyTopKRouter"]


class NoisyTopKRouter(LinearRouter):
    r"""Noisy top-k gate of Shazeer et al., arXiv 1701.06538.

    .. math:: z = (x W_g + b_g) / \tau, \qquad \tilde z = z + \epsilon \, \mathrm{softplus}(x W_n + b_n)

    with standard normal :math:`\epsilon`, in training only. The k largest :math:`\tilde z` are selected by index, so
    ties never select more than k. Their softmax gives the weights. For k = 1 that softmax is constant and would leave
    the router without a gradient. The weight is then the full-softmax probability, as in Switch (arXiv 2101.03961).

    Args:
        in_features: D.
        num_experts: E.
        k: Number of experts chosen per row.
        noisy: Whether to add noise in training. Without it the second projection does not exist.
        temperature: :math:`\tau`.
        balance: Coefficients of "importance", "load", "switch", "z" and "kl". See `moe_heads.balance`.
        normalize: Whether the gate reads normalized rows; see `LinearRouter`.

    Raises:
        ValueError: If k > num_experts, a size is below 1, the temperature is not positive, a balance term is unknown,
            or the load loss is used without noise.

    Example:
        >>> import torch
        >>> from moe_heads.routers import NoisyTopKRouter
        >>> NoisyTopKRouter(16, 4, k=2)(torch.randn(5, 16)).indices.shape
        torch.Size([5, 2])
    """

    k: int

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        k: int,
        noisy: bool = True,
        temperature: float = 1.0,
        balance: Mapping[str, float] | None = None,
        normalize: bool = False,
    ) -> None:
        check_chosen(k, num_experts)
        super().__init__(in_features, num_experts, temperature, balance, normalize=normalize)
        if not noisy and self.balance.get("load"):
            raise ValueError(
                f"balance['load']: expected noisy=True, since the smooth load differentiates through the noise, got"
                f" noisy={noisy}. With noisy=False use balance={{'switch': 0.1}}."
            )
        self.k = k
        self.noise = _ZeroGate(in_features, num_experts) if noisy else None

    def forward(self, x: Tensor, rows_per_sample: int = 1, mask: Tensor | None = None) -> Routing:
        """Route the rows x, (N, D), in fp32 or wider."""
        x = self.real_rows(x, mask)
        logits = self.gate_logits(x)
        noise_std = noisy_logits = None
        if self.noise is not None and self.training:
            noise_std = F.softplus(linear_fp32(self.noise, self.gate_input(x)))
            noisy_logits = logits + torch.randn_like(logits) * noise_std
        deciding = logits if noisy_logits is None else noisy_logits
        probs = deciding.softmax(-1)
        values, indices = deciding.topk(self.k, dim=-1)
        return self.routing(
            logits,
            probs,
            rows_per_sample,
            mask,
            indices=indices,
            weights=self._weights(values, probs, indices),
            noisy_logits=noisy_logits,
            noise_std=noise_std,
        )

    def rechosen(self, routing: Routing, reference: Routing) -> Routing:
        """Return the experts of ``reference`` with the weights that the logits of ``routing`` give them."""
        indices = reference.indices
        assert indices is not None
        values = routing.deciding_logits.gather(-1, indices)
        return replace(routing, indices=indices, weights=self._weights(values, routing.probs, indices))

    def _weights(self, values: Tensor, probs: Tensor, indices: Tensor) -> Tensor:
        """Compute the weights of the chosen experts from their logits, (N, K), and the full softmax."""
        return probs.gather(-1, indices) if self.k == 1 else values.softmax(-1)

    def active_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the gate. The noise is used in training only."""
        return self.gate.parameters()

    def extra_repr(self) -> str:
        """Return the settings that the lines of the submodules do not show."""
        return f"k={self.k}, {super().extra_repr()}"


class _ZeroGate(Gate):
    """Linear layer initialized to zero: all experts start with the noise softplus(0) = 0.69, a nearly random choice."""

    def reset_parameters(self) -> None:
        super().reset_parameters()  # keeps the sequence of random numbers of a seed unchanged
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

"""Top-1 gate of the Switch Transformer, Fedus et al., arXiv 2101.03961."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moe_heads.checks import check_shares
from moe_heads.routers.linear import LinearRouter
from moe_heads.routing import Routing

__all__ = ["SwitchRouter"]


class SwitchRouter(LinearRouter):
    r"""Top-1 gate of the Switch Transformer, Fedus et al., arXiv 2101.03961, section 2.

    .. math:: p = \mathrm{softmax}\big((x \odot u) W_g + b_g\big), \qquad y = p_i f_i(x), \quad i = \arg\max_e p_e

    with :math:`u \sim U(1 - \epsilon, 1 + \epsilon)` in training only. This is the input jitter of the paper, which
    explores near the boundaries. No row is dropped: the capacity factor of the paper exists for fixed buffers, which
    the dispatch here does not need.

    Args:
        in_features: D.
        num_experts: E.
        jitter: :math:`\epsilon`, in [0, 1). The default is 0.01 as in the paper.
        temperature: Divisor of the logits.
        balance: Coefficients of the balance losses. The default is the Switch loss with 0.01, as in the paper.
        normalize: Whether the gate reads normalized rows; see `LinearRouter`.

    Raises:
        ValueError: If a size is below 1, the jitter is outside [0, 1), the temperature is not positive, or a balance
            term is unknown.

    Example:
        >>> import torch
        >>> from moe_heads import SparseMoE
        >>> from moe_heads.routers import SwitchRouter
        >>> head = SparseMoE(16, 3, num_experts=4, router=SwitchRouter(16, 4))
        >>> head(torch.randn(5, 16), return_routing=True).routing.indices.shape
        torch.Size([5, 1])
    """

    balance_terms = ("switch", "importance", "z", "kl")
    k = 1

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        jitter: float = 0.01,
        temperature: float = 1.0,
        balance: Mapping[str, float] | None = {"switch": 0.01},
        normalize: bool = False,
    ) -> None:
        super().__init__(in_features, num_experts, temperature, balance, normalize=normalize)
        check_shares(jitter=jitter)
        self.jitter = jitter

    def forward(self, x: Tensor, rows_per_sample: int = 1, mask: Tensor | None = None) -> Routing:
        """Route the rows x, (N, D), in fp32 or wider."""
        x = self.real_rows(x, mask)
        logits = self.gate_logits(x)
        noisy_logits = None
        if self.training and self.jitter:
            wide = x.to(logits.dtype)
            noisy_logits = self.gate_logits(wide * torch.empty_like(wide).uniform_(1 - self.jitter, 1 + self.jitter))
        probs = (logits if noisy_logits is None else noisy_logits).softmax(-1)
        indices = probs.argmax(-1, keepdim=True)
        return self.routing(
            logits,
            probs,
            rows_per_sample,
            mask,
            indices=indices,
            weights=self._weights(probs, indices),
            noisy_logits=noisy_logits,
        )

    def rechosen(self, routing: Routing, reference: Routing) -> Routing:
        """Return the expert of ``reference`` with its probability in ``routing``."""
        assert reference.indices is not None
        return replace(routing, indices=reference.indices, weights=self._weights(routing.probs, reference.indices))

    @staticmethod
    def _weights(probs: Tensor, indices: Tensor) -> Tensor:
        return probs.gather(-1, indices)

    def extra_repr(self) -> str:
        """Return the settings that the lines of the submodules do not show."""
        return f"jitter={self.jitter}, {super().extra_repr()}"

"""Soft gate: every expert runs, weighted by a softmax."""

from collections.abc import Mapping

from torch import Tensor

from moe_heads.checks import check_at_least_one
from moe_heads.routers.linear import LinearRouter
from moe_heads.routing import Routing

__all__ = ["SoftmaxRouter"]


class SoftmaxRouter(LinearRouter):
    r"""Soft gate :math:`p = \mathrm{softmax}(z)`, :math:`z = (x W_g + b_g) / \tau`: every expert, weighted.

    Args:
        in_features: D.
        num_experts: E.
        temperature: :math:`\tau`. Above 1 the gate is flatter.
        balance: Coefficients of "kl", "importance" and "z". See `moe_heads.balance`.
        slots_per_expert: S, the number of logits per expert. The gate of an expert is the sum over its slots, so its
            logit in the `Routing` is their logsumexp.
        normalize: Whether the gate reads normalized rows; see `LinearRouter`.

    Raises:
        ValueError: If a size is below 1, the temperature is not positive, or a balance term is unknown.

    Example:
        >>> import torch
        >>> from moe_heads.routers import SoftmaxRouter
        >>> SoftmaxRouter(16, 4)(torch.randn(5, 16)).gates.shape
        torch.Size([5, 4])
    """

    balance_terms = ("kl", "importance", "z")

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        temperature: float = 1.0,
        balance: Mapping[str, float] | None = None,
        slots_per_expert: int = 1,
        normalize: bool = False,
    ) -> None:
        check_at_least_one(slots_per_expert=slots_per_expert)
        super().__init__(in_features, num_experts, temperature, balance, slots_per_expert, normalize=normalize)
        self.slots_per_expert = slots_per_expert

    def forward(self, x: Tensor, rows_per_sample: int = 1, mask: Tensor | None = None) -> Routing:
        """Route the rows x, (N, D), in fp32 or wider."""
        x = self.real_rows(x, mask)
        slot_logits = self.gate_logits(x).unflatten(-1, (-1, self.slots_per_expert))
        logits = slot_logits.squeeze(-1) if self.slots_per_expert == 1 else slot_logits.logsumexp(-1)
        return self.routing(logits, logits.softmax(-1), rows_per_sample, mask, slot_logits=slot_logits)

    def extra_repr(self) -> str:
        """Return the settings that the lines of the submodules do not show."""
        return f"slots_per_expert={self.slots_per_expert}, {super().extra_repr()}"

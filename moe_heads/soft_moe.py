"""Soft mixture-of-experts head: every expert runs, and the gate weights their outputs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_heads.checks import check_at_least_one
from moe_heads.dispatch import sum_all
from moe_heads.experts import Experts
from moe_heads.flops import Flops
from moe_heads.head import Head
from moe_heads.routed_module import masked_mean
from moe_heads.routers import SoftmaxRouter
from moe_heads.routing import Routing

__all__ = ["SoftMoE"]


class SoftMoE(Head):
    r"""Softmax mixture of experts for pooled features, Soft MoE with slots for tokens.

    For features (B, D), :math:`y = \sum_e p_e(x) f_e(x)` with :math:`p = \mathrm{softmax}((x W_g + b_g)/\tau)`. For
    tokens (B, T, D), the head is Soft MoE of Puigcerver et al. (arXiv 2308.00951). A softmax over the tokens fills E·S
    slots, expert e runs on its S slots, and a softmax over the slots maps the outputs back to the tokens. The logits of
    the tokens are averaged. One token and one slot per expert give the first form. For that reason the normalization
    of x and of the gate in the paper is omitted.

    The defaults are those of the study (arXiv 2601.15021): 271,960 parameters for 512 features and 10 classes.

    Args:
        in_features: D.
        num_classes: C.
        num_experts: E.
        expert_width: Hidden units of one expert.
        slots_per_expert: S. With pooled features all slots of an expert have the same input, so more than one slot
            is useful for tokens only.
        temperature: :math:`\tau` of the gate. Above 1 the mixture is flatter.
        dropout: Dropout probability after the ReLU of an expert.
        balance: Coefficients of the balance losses "kl" (mean gate against uniform, 0.2 as in the study), "importance"
            and "z". See `moe_heads.balance`.

    Raises:
        ValueError: If a size is below 1, the temperature is not positive, the dropout is outside [0, 1), or a balance
            term is unknown.

    Example:
        >>> import torch
        >>> from moe_heads import SoftMoE
        >>> head = SoftMoE(512, 10)
        >>> output = head(torch.randn(4, 512), return_routing=True)
        >>> output.logits.shape, output.routing.gates.shape
        (torch.Size([4, 10]), torch.Size([4, 8]))
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_experts: int = 8,
        expert_width: int = 64,
        slots_per_expert: int = 1,
        temperature: float = 1.0,
        dropout: float = 0.1,
        balance: Mapping[str, float] | None = {"kl": 0.2},
    ) -> None:
        super().__init__(in_features, num_classes)
        check_at_least_one(num_experts=num_experts, slots_per_expert=slots_per_expert)
        self.num_experts, self.expert_width, self.slots_per_expert = num_experts, expert_width, slots_per_expert
        self.router = SoftmaxRouter(in_features, num_experts, temperature, balance, slots_per_expert)
        self.experts = Experts(num_experts, in_features, expert_width, num_classes, dropout)

    def classify(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Routing | None]:
        """Compute the logits (B, C) and the routing of the rows or tokens."""
        if x.dim() == 2:
            routing = self.router.route(x, 1, mask)
            return sum_all(self.experts, x, routing.gates), routing
        batch, tokens, _ = x.shape
        routing = self.router.route(x.flatten(0, 1), tokens, None if mask is None else mask.flatten())
        assert routing.slot_logits is not None
        slot_logits = routing.slot_logits.unflatten(0, (batch, tokens))
        competing = slot_logits
        if mask is not None:
            # the lowest number instead of -inf, whose softmax is nan in a sample without a real token
            lowest = torch.finfo(slot_logits.dtype).min
            competing = slot_logits.masked_fill(~mask.view(batch, tokens, 1, 1), lowest)
        dispatch = competing.softmax(1)
        combine = slot_logits.flatten(2).softmax(-1)
        slots = torch.einsum("btes,btd->besd", dispatch.to(x.dtype), x)
        # the mean over the tokens is linear, so it is applied to the weights, before the product
        outputs = self.experts.each(slots)
        weights = masked_mean(combine, mask).view(batch, *slot_logits.shape[2:])
        return torch.einsum("bes,besc->bc", weights.to(outputs.dtype), outputs), routing

    def count_flops(self, batch: int, tokens: int) -> Flops:
        """Count the gate, every expert, and for tokens the two mixtures, all of which are active."""
        slots = self.num_experts * self.slots_per_expert
        gate = 2 * batch * tokens * self.in_features * slots
        if tokens == 1:
            flops = gate + batch * self.num_experts * self.experts.flops_per_row
        else:
            mixtures = 2 * batch * slots * (tokens * self.in_features + self.num_classes)
            flops = gate + mixtures + batch * slots * self.experts.flops_per_row
        return Flops(flops, flops)

"""Gates: modules that decide which experts a row goes to, and with which weight."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.checks import check_at_least_one, check_balance, check_positive
from moe_heads.routing import Router, Routing

__all__ = ["NoisyTopKRouter", "SoftmaxRouter"]


class SoftmaxRouter(Router):
    r"""Soft gate :math:`p = \mathrm{softmax}(z)`, :math:`z = (x W_g + b_g) / \tau`: every expert, weighted.

    Args:
        in_features: D.
        num_experts: E.
        temperature: :math:`\tau`; above 1 the gate is flatter.
        balance: Coefficients of "kl", "importance" and "z"; see `moe_heads.balance`.
        slots_per_expert: S logits an expert; the expert's gate is the sum over its slots, so its logit in the `Routing`
            is their logsumexp.
    """

    balance_terms = ("kl", "importance", "z")

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        temperature: float = 1.0,
        balance: Mapping[str, float] | None = None,
        slots_per_expert: int = 1,
    ) -> None:
        super().__init__()
        check_at_least_one(in_features=in_features, num_experts=num_experts, slots_per_expert=slots_per_expert)
        check_positive(temperature=temperature)
        balance = {} if balance is None else balance
        check_balance(balance, self.balance_terms)
        self.temperature = temperature
        self.balance = dict(balance)
        self.slots_per_expert = slots_per_expert
        self.gate = nn.Linear(in_features, num_experts * slots_per_expert)

    def forward(self, x: Tensor, rows_per_sample: int = 1) -> Routing:
        """Route the rows x, (N, D), in fp32 or wider."""
        slot_logits = (linear_fp32(self.gate, x) / self.temperature).unflatten(-1, (-1, self.slots_per_expert))
        logits = slot_logits.squeeze(-1) if self.slots_per_expert == 1 else slot_logits.logsumexp(-1)
        return Routing(
            logits=logits,
            probs=logits.softmax(-1),
            slot_logits=slot_logits,
            balance=self.balance,
            rows_per_sample=rows_per_sample,
            sync=self.training,
        )

    def extra_repr(self) -> str:
        """Settings that the children's lines do not show."""
        return f"temperature={self.temperature}, balance={self.balance}"


class NoisyTopKRouter(Router):
    r"""Noisy top-k gate of Shazeer et al., arXiv 1701.06538.

    .. math:: z = (x W_g + b_g) / \tau, \qquad \tilde z = z + \epsilon \, \mathrm{softplus}(x W_n + b_n)

    with standard normal :math:`\epsilon`, in training only. The k largest :math:`\tilde z` are selected by index, so
    ties never select more than k; their softmax gives the weights. For k = 1 that softmax is constant and would leave
    the router without a gradient: the weight is then the full-softmax probability, as in Switch (arXiv 2101.03961).

    Args:
        in_features: D.
        num_experts: E.
        k: Experts chosen a row.
        noisy: Draw noise in training; without it the second projection does not exist.
        temperature: :math:`\tau`.
        balance: Coefficients of "importance", "load", "switch", "z" and "kl"; see `moe_heads.balance`.
    """

    balance_terms = ("importance", "load", "switch", "z", "kl")

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        k: int,
        noisy: bool = True,
        temperature: float = 1.0,
        balance: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        check_at_least_one(in_features=in_features, num_experts=num_experts, k=k)
        check_positive(temperature=temperature)
        balance = {} if balance is None else balance
        check_balance(balance, self.balance_terms)
        if k > num_experts:
            raise ValueError(f"k: expected at most num_experts = {num_experts}; got {k}")
        if not noisy and balance.get("load"):
            raise ValueError(
                "balance['load']: the smooth load differentiates through the noise, so it needs noisy=True; with"
                " noisy=False use balance={'importance': 0.2} or {'switch': 0.01}"
            )
        self.k = k
        self.temperature = temperature
        self.balance = dict(balance)
        self.gate = nn.Linear(in_features, num_experts)
        self.noise = nn.Linear(in_features, num_experts) if noisy else None
        if self.noise is not None:
            # every expert starts with the same noise, softplus(0) = 0.69: at first the choice is close to random
            nn.init.zeros_(self.noise.weight)
            nn.init.zeros_(self.noise.bias)

    def forward(self, x: Tensor, rows_per_sample: int = 1) -> Routing:
        """Route the rows x, (N, D), in fp32 or wider."""
        logits = linear_fp32(self.gate, x) / self.temperature
        noise_std = noisy_logits = None
        if self.noise is not None and self.training:
            noise_std = F.softplus(linear_fp32(self.noise, x))
            noisy_logits = logits + torch.randn_like(logits) * noise_std
        deciding = logits if noisy_logits is None else noisy_logits
        probs = deciding.softmax(-1)
        top = deciding.topk(self.k, dim=-1)
        weights = probs.gather(-1, top.indices) if self.k == 1 else top.values.softmax(-1)
        return Routing(
            logits=logits,
            probs=probs,
            indices=top.indices,
            weights=weights,
            noisy_logits=noisy_logits,
            noise_std=noise_std,
            balance=self.balance,
            rows_per_sample=rows_per_sample,
            sync=self.training,
        )

    def extra_repr(self) -> str:
        """Settings that the children's lines do not show."""
        return f"k={self.k}, temperature={self.temperature}, balance={self.balance}"


def linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)`` in fp32 (or wider, if x is), also under autocast: in bf16 near ties would flip the choice."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))

"""What the routers share: a linear gate in full precision, a temperature, and balance losses."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.checks import check_at_least_one, check_balance, check_positive
from moe_heads.precision import is_autocasting
from moe_heads.routing import Router

__all__ = ["LinearRouter", "check_chosen", "linear_fp32"]


class LinearRouter(Router):
    r"""Base of the routers with logits :math:`z = (x W_g + b_g) / \tau`.

    Args:
        in_features: D.
        num_experts: E.
        temperature: :math:`\tau`.
        balance: Coefficients of the balance losses that `balance_terms` lists; see `moe_heads.balance`.
        logits_per_expert: Rows of the gate an expert has.

    Raises:
        ValueError: If a size is below 1, the temperature not positive, or a balance term unknown.
    """

    balance_terms: tuple[str, ...] = ("importance", "load", "switch", "z", "kl")
    """Balance losses that make sense for this router."""

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        temperature: float = 1.0,
        balance: Mapping[str, float] | None = None,
        logits_per_expert: int = 1,
    ) -> None:
        super().__init__()
        check_at_least_one(in_features=in_features, num_experts=num_experts)
        check_positive(temperature=temperature)
        balance = {} if balance is None else balance
        check_balance(balance, self.balance_terms)
        self.in_features, self.num_experts = in_features, num_experts
        self.temperature = temperature
        self.balance = dict(balance)
        self.gate = nn.Linear(in_features, num_experts * logits_per_expert)

    def gate_logits(self, x: Tensor) -> Tensor:
        """Logits z of the rows x, in fp32 or wider."""
        logits = linear_fp32(self.gate, x)
        return logits if self.temperature == 1 else logits / self.temperature

    def keep(self, experts: Sequence[int]) -> Self:
        """A copy that knows these experts only: every layer and buffer with a row an expert loses the others."""
        kept = copy.deepcopy(self)
        kept.num_experts = len(experts)
        with torch.no_grad():
            for layer in kept.children():
                if isinstance(layer, nn.Linear):
                    for name, parameter in list(layer.named_parameters(recurse=False)):
                        rows = _rows(parameter, experts, self.num_experts)
                        setattr(layer, name, nn.Parameter(rows, parameter.requires_grad))
                    layer.out_features = len(layer.weight)
            for name, buffer in kept.named_buffers(recurse=False):
                setattr(kept, name, _rows(buffer, experts, self.num_experts))
        return kept

    def extra_repr(self) -> str:
        """Settings that the children's lines do not show."""
        return f"temperature={self.temperature}, balance={self.balance}"


def linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)`` in fp32 (or wider, if x is), also under autocast: in bf16 near ties would flip the choice.

    The layer is called, so that hooks and what stands in its place (an adapter, say) are part of it; but for one in
    half precision, whose weights are cast.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = getattr(layer, "weight", None)
    half = weight is not None and weight.dtype in {torch.bfloat16, torch.float16}
    with torch.autocast(x.device.type, enabled=False) if is_autocasting(x) else nullcontext():
        if half:
            bias = None if layer.bias is None else layer.bias.to(dtype)
            return F.linear(x.to(dtype), layer.weight.to(dtype), bias)
        logits: Tensor = layer(x if x.dtype == dtype else x.to(dtype))
        return logits


def check_chosen(k: int, num_experts: int) -> None:
    """Refuse anything but a number of experts between one and all."""
    check_at_least_one(num_experts=num_experts, k=k)
    if k > num_experts:
        raise ValueError(f"k: expected at most num_experts = {num_experts}, got {k}")


def _rows(values: Tensor, experts: Sequence[int], num_experts: int) -> Tensor:
    """The rows of the experts, of which each may have several in a block."""
    blocks = values.detach().unflatten(0, (num_experts, -1))
    kept: Tensor = blocks[list(experts)]
    return kept.flatten(0, 1)

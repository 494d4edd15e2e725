"""Base class of the routers: a linear gate in full precision, a temperature, and balance losses."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.checks import check_at_least_one, check_balance, check_flags, check_positive
from moe_heads.modes import is_transformed
from moe_heads.precision import is_autocasting
from moe_heads.routing import LossWatch, Router, Routing

__all__ = ["Gate", "LinearRouter", "check_chosen", "linear_fp32"]

# Added to the variance of a row, as in torch's layer norm.
_EPS = 1e-5


class LinearRouter(Router):
    r"""Base of the routers with logits :math:`z = (x W_g + b_g) / \tau`, or the same of the normalized x.

    Args:
        in_features: D.
        num_experts: E.
        temperature: :math:`\tau`.
        balance: Coefficients of the balance losses listed in `balance_terms`. See `moe_heads.balance`.
        logits_per_expert: Number of rows of the gate per expert.
        normalize: Whether the gate reads :math:`(x - \bar x) / \mathrm{std}(x)` of each row instead of x, a layer norm
            without parameters. The size of the features then has no effect on the choice. Together with
            shared experts and the Switch loss it keeps every expert in use on the digits (docs/results.md).

    Raises:
        ValueError: If a size is below 1, the temperature is not positive, a balance term is unknown, or ``normalize``
            is no bool, or True for fewer than three features.
    """

    balance_terms: tuple[str, ...] = ("importance", "load", "switch", "z", "kl")
    """Balance losses that this router supports."""

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        temperature: float = 1.0,
        balance: Mapping[str, float] | None = None,
        logits_per_expert: int = 1,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        check_at_least_one(in_features=in_features, num_experts=num_experts)
        check_positive(temperature=temperature)
        balance = {} if balance is None else balance
        check_balance(balance, self.balance_terms)
        check_flags(normalize=normalize)
        if normalize and in_features < 3:
            raise ValueError(
                f"normalize: expected False for in_features = {in_features}, got True. Fewer than three features are"
                " constant, or all equal in size, when they are normalized."
            )
        self.in_features, self.num_experts = in_features, num_experts
        self.temperature, self.normalize = temperature, normalize
        self.balance = dict(balance)
        self.gate = Gate(in_features, num_experts * logits_per_expert)
        self.loss_watch = LossWatch()

    @staticmethod
    def real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the rows with zeros in padded ones, whose content could be nan and reach the gradient of the gate."""
        return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)

    def gate_logits(self, x: Tensor) -> Tensor:
        """Compute the logits z of the rows x, in fp32 or wider."""
        logits = linear_fp32(self.gate, self.gate_input(x))
        return logits if self.temperature == 1 else logits / self.temperature

    def gate_input(self, x: Tensor) -> Tensor:
        """Return the input of the gate for the rows x: x itself, or its normalized form in fp32 or wider."""
        if not self.normalize:
            return x
        # by hand: the third derivatives of torch's layer norm are wrong (2.15), as in the Hessian of a gradient penalty
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centered = wide - wide.mean(-1, keepdim=True)
        return centered * (centered.square().mean(-1, keepdim=True) + _EPS).rsqrt()

    def routing(
        self, logits: Tensor, probs: Tensor, rows_per_sample: int = 1, mask: Tensor | None = None, **choice: Any
    ) -> Routing:
        """Build the decisions of a pass with the settings of this router.

        Args:
            logits: Clean logits, (N, E).
            probs: Softmax of the logits that decide, (N, E).
            rows_per_sample: T.
            mask: Rows that are real, (N,), or None.
            **choice: Further fields of `Routing`.
        """
        return Routing(
            logits=logits,
            probs=probs,
            balance=self.balance,
            rows_per_sample=rows_per_sample,
            mask=mask,
            sync=self.training,
            watch=self._watched_pass(choice.get("weights", probs)),
            **choice,
        )

    def _watched_pass(self, weights: Tensor) -> LossWatch | None:
        """Watch a training pass in which a balance loss could get a gradient, and return its record."""
        # a compiled program cannot count
        if torch.compiler.is_compiling() or self.loss_watch.has_gradient or is_transformed():
            return None
        if not (self.training and weights.requires_grad and any(self.balance.values())):
            return None
        if self.num_experts == (1 if self.k is None else self.k):
            return None  # there is nothing to balance
        if not any(parameter.requires_grad for parameter in self.parameters()):
            return None
        self.loss_watch.watch(
            weights, f"{type(self).__name__} of {self.in_features} features and {self.num_experts} experts"
        )
        return self.loss_watch

    def keep(self, experts: Sequence[int]) -> Self:
        """Return a copy with only these experts. Layers and buffers with one row per expert lose the other rows."""
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
        """Return the settings that the lines of the submodules do not show."""
        normalized = ", normalize=True" if self.normalize else ""
        return f"temperature={self.temperature}, balance={self.balance}{normalized}"


class Gate(nn.Linear):
    """Linear layer of a router.

    `torch.ao.quantization.quantize_dynamic` replaces layers of the class `torch.nn.Linear` only. The gate stays in full
    precision, because rounded logits choose other experts.
    """


def linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """Compute ``layer(x)`` in fp32 (or wider, if x is), also under autocast: bf16 would flip the choice at near ties.

    The layer itself is called, so that hooks and replacements (such as an adapter) take effect. The exception is a
    layer in half precision, whose weights are cast.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = getattr(layer, "weight", None)
    # the weight of a quantized layer is a method
    half = isinstance(weight, Tensor) and weight.dtype in {torch.bfloat16, torch.float16}
    with torch.autocast(x.device.type, enabled=False) if is_autocasting(x) else nullcontext():
        if half:
            bias = None if layer.bias is None else layer.bias.to(dtype)
            return F.linear(x.to(dtype), layer.weight.to(dtype), bias)
        logits: Tensor = layer(x if x.dtype == dtype else x.to(dtype))
        return logits


def check_chosen(k: int, num_experts: int) -> None:
    """Check that k is a number of experts between 1 and num_experts."""
    check_at_least_one(num_experts=num_experts, k=k)
    if k > num_experts:
        raise ValueError(f"k: expected at most num_experts = {num_experts}, got {k}.")


def _rows(values: Tensor, experts: Sequence[int], num_experts: int) -> Tensor:
    """Return the rows of the experts. Each expert may have a block of several rows."""
    blocks = values.detach().unflatten(0, (num_experts, -1))
    kept: Tensor = blocks[list(experts)]
    return kept.flatten(0, 1)

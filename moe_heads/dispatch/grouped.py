"""Path with one grouped matrix product over the rows sorted by expert: static shapes, no host synchronization.

It is for many rows, also under torch.compile. `torch.nn.functional.grouped_mm` has no bias and no forward-mode
derivative.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from moe_heads.dispatch.assignments import assignments, combine
from moe_heads.experts import Experts
from moe_heads.modes import is_transformed
from moe_heads.precision import compute_dtype
from moe_heads.routing import Routing

__all__ = ["mix_grouped", "why_not_grouped"]

# alignment of the strides of every operand
_ALIGNMENT_BYTES = 16

# torch checks the operands of a graph for bf16 up to 2.13, also on a CPU
_COMPILES_BF16_ONLY = torch.__version__ < "2.14"


def mix_grouped(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """Compute the weighted sum of the chosen experts (N, C) for the rows x (N, D)."""
    chosen = assignments(routing)
    dtype = compute_dtype(x)
    weight1, bias1, weight2, bias2 = experts.stacks()
    if x.dtype != dtype or weight1.dtype != dtype:
        x, weight1, bias1, weight2, bias2 = (tensor.to(dtype) for tensor in (x, weight1, bias1, weight2, bias2))
    indices = torch.arange(experts.num_experts, device=x.device)
    ends = torch.searchsorted(chosen.experts, indices, right=True, out_int32=True)
    if torch.is_grad_enabled():
        weight1, weight2 = _DenseGradient.apply(weight1), _DenseGradient.apply(weight2)
    hidden = F.grouped_mm(x.index_select(0, chosen.rows), weight1.transpose(1, 2), offs=ends)
    hidden = experts.activate(hidden.add_(bias1.index_select(0, chosen.experts)))
    if torch.is_grad_enabled() or x.device.type != "cpu":
        # classes of zeros pad the rows of the result, because its gradient is an operand too
        weight2 = F.pad(weight2, (0, 0, 0, -experts.out_features % (_ALIGNMENT_BYTES // dtype.itemsize)))
    outputs = F.grouped_mm(hidden, weight2.transpose(1, 2), offs=ends)[:, : experts.out_features]
    return combine(outputs + bias2.index_select(0, chosen.experts), chosen, x.shape[0])


class _DenseGradient(torch.autograd.Function):
    """Identity with contiguous gradients of every order: grouped_mm rejects strides of zero.

    The gradient of the plain sum of a gradient has such strides.
    """

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        dense: Tensor = _DenseGradient.apply(gradient.contiguous())
        return dense


def why_not_grouped(experts: Experts, x: Tensor) -> str | None:
    """Return the reason why the grouped product does not support these experts and rows, or None if it does."""
    dtype, device = compute_dtype(x), x.device.type
    if dtype not in {torch.float32, torch.bfloat16, torch.float16}:
        return f"expected fp32, bf16 or fp16, got {dtype}"
    if device not in {"cpu", "cuda", "meta"}:
        return f"expected a CPU or a CUDA device, got {device}"
    if device == "cuda" and (dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) < (9, 0)):
        # torch falls back to a loop whose bounds the host reads
        return f"expected bf16 and compute capability 9.0 on a CUDA device, got {dtype} on {x.device}"
    if _COMPILES_BF16_ONLY and dtype != torch.bfloat16 and torch.compiler.is_compiling():
        return f"expected bf16 in a compiled or exported graph with torch < 2.14, got {dtype}"
    if is_transformed():
        # a setup_context would support torch.func, at the cost of inspecting signatures in every other pass
        return "expected no transform of torch.func, got one"
    multiple = _ALIGNMENT_BYTES // dtype.itemsize
    if experts.in_features % multiple or experts.width % multiple:
        return (
            f"expected in_features and expert_width to be multiples of {multiple} in {dtype}, got"
            f" {experts.in_features} and {experts.width}"
        )
    if forward_ad._current_level >= 0:
        return "expected no forward-mode derivative, which grouped_mm does not have, got one"
    return None

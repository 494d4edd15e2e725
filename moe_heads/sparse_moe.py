"""The sparse head: a noisy gate chooses k experts a row."""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from moe_heads.checks import check_at_least_one, check_option
from moe_heads.experts import Experts
from moe_heads.head import Head
from moe_heads.routers import NoisyTopKRouter
from moe_heads.routing import Routing

__all__ = ["Dispatch", "SparseMoE"]

Dispatch = Literal["auto", "all", "selected"]

# What the bookkeeping of the "selected" dispatch costs, in multiply-adds that the CPU does in the same time. Fitted to
# examples/benchmarks/dispatch.py, where "auto" took the faster path in all 30 cells.
_MACS_PER_SEGMENT = 750_000
_MACS_PER_COPIED_FEATURE = 32


class SparseMoE(Head):
    r"""Top-k mixture of experts, :math:`y = \sum_{e \in \mathrm{top}_k} g_e(x) f_e(x)`.

    The gate g is that of `moe_heads.routers.NoisyTopKRouter`. Tokens (B, T, D) are routed one by one and their logits
    averaged over T. The loss is piecewise smooth: its derivatives are those at fixed choice of the experts.

    The defaults are those of the study (arXiv 2601.15021): 276,064 parameters for 512 features and 10 classes, 71,068
    of them active in the evaluation of one row.

    Args:
        in_features: D.
        num_classes: C.
        num_experts: E.
        expert_width: Hidden units of one expert.
        k: Experts chosen a row; with 1 the weight is the full-softmax probability, which keeps the router's gradient.
        noisy: Draw noise on the logits in training (never in evaluation); it explores, and the load loss needs it.
        temperature: Divides the router's logits; above 1 the weights are flatter.
        dropout: Probability after an expert's ReLU.
        balance: Coefficients of the balance losses "importance", "load", "switch", "z" and "kl"; 0.2 for the first
            two as in the study; see `moe_heads.balance`.
        dispatch: How the experts run; the result is the same. "all": every expert on every row, masked by the
            weights, static shapes, what torch.compile, torch.export, vmap and CUDA graphs need. "selected": an expert
            runs on the rows that chose it. "auto": "selected" in eager mode on a CPU when it saves more arithmetic
            than its bookkeeping costs, else "all".

    Raises:
        ValueError: If k > num_experts, a size is below 1, the temperature not positive, the dropout outside [0, 1), a
            balance term or dispatch unknown, or the load loss asked for without noise.

    Example:
        >>> import torch
        >>> from moe_heads import SparseMoE
        >>> head = SparseMoE(512, 10)
        >>> output = head(torch.randn(4, 512), return_routing=True)
        >>> output.logits.shape, output.routing.indices.shape
        (torch.Size([4, 10]), torch.Size([4, 2]))
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_experts: int = 8,
        expert_width: int = 64,
        k: int = 2,
        noisy: bool = True,
        temperature: float = 1.0,
        dropout: float = 0.1,
        balance: Mapping[str, float] | None = {"importance": 0.2, "load": 0.2},
        dispatch: Dispatch = "auto",
    ) -> None:
        super().__init__(in_features, num_classes)
        check_at_least_one(num_experts=num_experts)
        check_option("dispatch", dispatch, get_args(Dispatch))
        self.num_experts, self.expert_width, self.k = num_experts, expert_width, k
        self.dispatch: Dispatch = dispatch
        self.router = NoisyTopKRouter(in_features, num_experts, k, noisy, temperature, balance)
        self.experts = Experts(num_experts, in_features, expert_width, num_classes, dropout)

    def classify(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        """Logits (B, C) and the routing of the rows or tokens."""
        rows = x.flatten(0, -2)
        routing = self.router(rows, rows_per_sample=1 if x.dim() == 2 else x.shape[1])
        if self._runs_selected(rows):
            logits = self.experts.mix_selected(rows, routing.indices, routing.weights)
        else:
            logits = self.experts.mix_all(rows, routing.gates)
        return (logits.unflatten(0, x.shape[:-1]).mean(1) if x.dim() == 3 else logits), routing

    def _runs_selected(self, rows: Tensor) -> bool:
        if self.dispatch != "auto":
            return self.dispatch == "selected"
        if rows.device.type != "cpu" or _needs_static_shapes():
            return False
        num_rows = rows.shape[0]
        num_chosen = num_rows * self.k
        saved = num_rows * (self.num_experts - self.k) * self.expert_width * (self.in_features + self.num_classes)
        sorting = num_chosen * self.in_features * _MACS_PER_COPIED_FEATURE
        return saved > min(self.num_experts, num_chosen) * _MACS_PER_SEGMENT + sorting

    @property
    def num_active_parameters(self) -> int:
        """Parameters of k experts and of the gate; the noise takes part in training only."""
        gate = sum(parameter.numel() for parameter in self.router.gate.parameters())
        return gate + self.k * self.experts.parameters_per_expert


def _needs_static_shapes() -> bool:
    """Whether the call is compiled, exported, traced, or inside a torch.func transform such as vmap."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or torch._C._functorch.maybe_current_level() is not None
    )

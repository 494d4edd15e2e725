"""Balance without a loss: a bias that enters the selection only, Wang et al., arXiv 2408.15664."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from moe_heads.checks import check_positive
from moe_heads.recomputation import in_backward
from moe_heads.routers.linear import LinearRouter, check_chosen
from moe_heads.routing import Routing

__all__ = ["BiasBalancedRouter"]


class BiasBalancedRouter(LinearRouter):
    r"""Top-k gate balanced by a bias on the selection, Wang et al., arXiv 2408.15664, algorithm 1.

    .. math::
        s = \mathrm{sigmoid}(z), \qquad I = \mathrm{TopK}(s + b), \qquad
        g_i = s_i \Big/ \sum_{j \in I} s_j, \qquad
        b_e \leftarrow b_e + u \, \mathrm{sign}\big(\bar c - c_e\big)

    where :math:`c_e` counts the rows of the last training batch (of all ranks) that chose expert e. The bias has no
    gradient and does not enter the weights, so it balances without bending the loss. For k = 1 the weight is
    :math:`s_i` itself, else the gate would have no gradient.

    A batch's counts move the bias at the start of the next training pass: in between, gradient checkpointing finds the
    router as it was. Bias and counts are buffers, saved in the state dict.

    Args:
        in_features: D.
        num_experts: E.
        k: Experts chosen a row.
        update_rate: u; 0.001 as in the paper.
        temperature: Divides the logits.
        balance: Coefficients of further balance losses; none by default, which is the point.

    Raises:
        ValueError: If k > num_experts, a size is below 1, a rate or the temperature not positive, or a balance term
            unknown.

    Example:
        >>> import torch
        >>> from moe_heads.routers import BiasBalancedRouter
        >>> router = BiasBalancedRouter(16, 4, k=2)
        >>> for _ in range(2):
        ...     routing = router(torch.randn(50, 16))
        >>> router.bias.abs().max()
        tensor(0.0010)
    """

    balance_terms = ("importance", "switch", "z", "kl")
    k: int
    bias: Tensor
    pending_counts: Tensor

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        k: int = 2,
        update_rate: float = 0.001,
        temperature: float = 1.0,
        balance: Mapping[str, float] | None = None,
    ) -> None:
        check_chosen(k, num_experts)
        super().__init__(in_features, num_experts, temperature, balance)
        check_positive(update_rate=update_rate)
        self.k = k
        self.update_rate = update_rate
        self.register_buffer("bias", torch.zeros(num_experts))
        self.register_buffer("pending_counts", torch.zeros(num_experts, dtype=torch.int64))

    def forward(self, x: Tensor, rows_per_sample: int = 1) -> Routing:
        """Route the rows x, (N, D), in fp32 or wider."""
        learns = self.training and not in_backward()
        if learns:
            self._move_bias()
        logits = self.gate_logits(x)
        affinity = logits.sigmoid()
        scores = affinity.detach() + self.bias
        indices = scores.topk(self.k, dim=-1).indices
        weights = affinity.gather(-1, indices)
        routing = Routing(
            logits=logits,
            probs=logits.softmax(-1),
            indices=indices,
            weights=weights if self.k == 1 else weights / weights.sum(-1, keepdim=True),
            scores=scores,
            balance=self.balance,
            rows_per_sample=rows_per_sample,
            sync=self.training,
        )
        if learns:
            self._note(routing)
        return routing

    @torch.no_grad()
    def _move_bias(self) -> None:
        counts = self.pending_counts.to(torch.float64 if self.bias.dtype == torch.float64 else torch.float32)
        self.bias.add_((counts.mean() - counts).sign().to(self.bias.dtype), alpha=self.update_rate)

    @torch.no_grad()
    def _note(self, routing: Routing) -> None:
        counts = routing.selected.masked_fill(~routing.valid.unsqueeze(-1), False).sum(0)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # summed here, not when it is used: DistributedDataParallel overwrites the buffers by those of rank zero
            dist.all_reduce(counts)
        self.pending_counts.copy_(counts)

    def extra_repr(self) -> str:
        """Settings that the children's lines do not show."""
        return f"k={self.k}, update_rate={self.update_rate}, {super().extra_repr()}"

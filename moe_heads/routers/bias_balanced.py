"""Loss-free balancing by a bias on the selection, Wang et al., arXiv 2408.15664."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from moe_heads.checks import check_positive
from moe_heads.modes import is_transformed
from moe_heads.routers.linear import LinearRouter, check_chosen
from moe_heads.routing import Routing

__all__ = ["BiasBalancedRouter"]

# Buffers that stay in float32 when the model is cast.
_WIDE = ("bias_steps", "pending_counts")


class BiasBalancedRouter(LinearRouter):
    r"""Top-k gate balanced by a bias on the selection, Wang et al., arXiv 2408.15664, algorithm 1.

    .. math::
        s = \mathrm{sigmoid}(z), \qquad I = \mathrm{TopK}(s + b), \qquad
        g_i = s_i \Big/ \sum_{j \in I} s_j, \qquad
        b_e \leftarrow b_e + u \, \mathrm{sign}\big(\bar c - c_e\big)

    where :math:`c_e` counts the rows of the last training pass (of all ranks) that chose expert e. The bias has no
    gradient and does not enter the weights, so it balances without changing the loss. The weights are normalized over
    the chosen experts as in DeepSeek-V3 (arXiv 2412.19437). For k = 1 the weight is :math:`s_i` itself, because the
    gate would have no gradient otherwise.

    The bias is updated once per optimizer step, in the first training pass after the gate has changed. Between two
    steps the router is a pure function. So gradient checkpointing, which runs a pass twice, chooses the same experts,
    also with torch.compile. With gradient accumulation the last pass before the step counts. The bias does not change
    with a frozen gate or under the transforms of torch.func. It is stored as a number of steps of u, and saved with the
    counts in the state dict. Both are float32, also after ``half()``, so that averages of models (EMA, SWA) average
    them, and whole numbers up to 16.7 million are exact.

    Args:
        in_features: D.
        num_experts: E.
        k: Number of experts chosen per row.
        update_rate: u. The default is 0.001 as in the paper.
        temperature: Divisor of the logits.
        balance: Coefficients of additional balance losses. There are none by default, since the bias balances the load.
        normalize: Whether the gate reads normalized rows; see `LinearRouter`.

    Raises:
        ValueError: If k > num_experts, a size is below 1, a rate or the temperature is not positive, or a balance term
            is unknown.

    Example:
        >>> import torch
        >>> from moe_heads.routers import BiasBalancedRouter
        >>> router = BiasBalancedRouter(16, 4, k=2)
        >>> optimizer = torch.optim.SGD(router.parameters(), lr=0.1)
        >>> for _ in range(2):
        ...     router(torch.randn(51, 16)).weights[:, 0].sum().backward()
        ...     optimizer.step()
        >>> router.selection_bias.abs().max()
        tensor(0.0010)
    """

    balance_terms = ("importance", "switch", "z", "kl")
    k: int
    bias_steps: Tensor
    pending_counts: Tensor
    seen_weight: Tensor

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        k: int = 2,
        update_rate: float = 0.001,
        temperature: float = 1.0,
        balance: Mapping[str, float] | None = None,
        normalize: bool = False,
    ) -> None:
        check_chosen(k, num_experts)
        super().__init__(in_features, num_experts, temperature, balance, normalize=normalize)
        check_positive(update_rate=update_rate)
        self.k = k
        self.update_rate = update_rate
        self.register_buffer("bias_steps", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("pending_counts", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("seen_weight", torch.zeros(num_experts, in_features + 1), persistent=False)

    def reset_parameters(self) -> None:
        """Reset the bias to zero, for use after `torch.nn.Module.to_empty`."""
        self.bias_steps.zero_()
        self.pending_counts.zero_()
        self.seen_weight.zero_()

    @property
    def selection_bias(self) -> Tensor:
        """Bias b that is added to the sigmoids for the selection, (E,)."""
        return self.bias_steps * self.update_rate

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        wide = {name: getattr(self, name) for name in _WIDE}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in wide.items():
            moved = getattr(self, name)
            if moved.dtype != before.dtype:
                setattr(self, name, before.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in _WIDE:
            if prefix + name in state_dict:  # formats 1 and 2 had integers
                state_dict[prefix + name] = state_dict[prefix + name].to(torch.float32)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, rows_per_sample: int = 1, mask: Tensor | None = None) -> Routing:
        """Route the rows x, (N, D), in fp32 or wider."""
        x = self.real_rows(x, mask)
        learns = self.training and not is_transformed()
        if learns:
            self._move_bias()
        logits = self.gate_logits(x)
        scores = logits.detach().sigmoid() + self.selection_bias
        indices = scores.topk(self.k, dim=-1).indices
        routing = self.routing(
            logits,
            logits.softmax(-1),
            rows_per_sample,
            mask,
            indices=indices,
            weights=self._weights(logits, indices),
            scores=scores,
        )
        if learns:
            self._note(routing)
        return routing

    def rechosen(self, routing: Routing, reference: Routing) -> Routing:
        """Return the experts of ``reference`` with the weights of their sigmoids in ``routing``."""
        assert reference.indices is not None
        return replace(routing, indices=reference.indices, weights=self._weights(routing.logits, reference.indices))

    def _weights(self, logits: Tensor, indices: Tensor) -> Tensor:
        chosen = logits.gather(-1, indices)
        # the softmax of log-sigmoids is the ratio of the sigmoids, without 0 / 0 where all of them vanish
        return chosen.sigmoid() if self.k == 1 else F.logsigmoid(chosen).softmax(-1)

    def keep(self, experts: Sequence[int]) -> Self:
        """Return a copy with only these experts."""
        kept = super().keep(experts)
        kept.pending_counts.zero_()  # they count choices among all experts
        return kept

    @torch.no_grad()
    def _move_bias(self) -> None:
        for name in _WIDE:  # FSDP casts buffers without a call of _apply
            buffer = getattr(self, name)
            if buffer.dtype != torch.float32:
                setattr(self, name, buffer.float())
        weight = torch.cat((self.gate.weight, self.gate.bias.unsqueeze(-1)), dim=-1)
        changed = (weight != self.seen_weight).any()
        counts = self.pending_counts
        # c < mean without a division: whole numbers stay exact
        missing = (counts.sum() - counts * self.num_experts).sign()
        self.bias_steps.add_(missing * changed)
        self.seen_weight.copy_(weight)

    @torch.no_grad()
    def _note(self, routing: Routing) -> None:
        counts = routing.selected.masked_fill(~routing.valid.unsqueeze(-1), False).sum(0)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # summed here rather than on use: DistributedDataParallel overwrites the buffers with those of rank zero
            dist.all_reduce(counts)
        self.pending_counts.copy_(counts)

    def extra_repr(self) -> str:
        """Return the settings that the lines of the submodules do not show."""
        return f"k={self.k}, update_rate={self.update_rate}, {super().extra_repr()}"

"""Expert choice: every expert takes the rows with the highest probability, Zhou et al., arXiv 2202.09368."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from moe_heads.checks import check_positive
from moe_heads.routers.linear import LinearRouter
from moe_heads.routing import Routing

__all__ = ["ExpertChoiceRouter"]

N = TypeVar("N", int, Tensor)


class ExpertChoiceRouter(LinearRouter):
    r"""Router in which every expert takes its most probable rows, Zhou et al., arXiv 2202.09368, section 3.2.

    .. math::
        S = \mathrm{softmax}(z) \in R^{n \times E}, \qquad
        (G, I) = \mathrm{TopK}\big(S^\top, M\big), \qquad M = \min(n, \lceil n k / E \rceil)

    The load is balanced by construction. A row may get several experts or none (`Routing.dropped`). In the latter case
    its logits come from the shared experts alone, or are zero. Several tokens of a sample compete with each other, so
    a sample does not depend on its batch. Pooled features (and single tokens) compete within the batch: **the logits
    of a row then depend on the other rows**, in evaluation too. They depend on the batches of an analysis and on the
    ranks that share the data. A single row is taken by every expert. Prefer this router for tokens.

    Args:
        in_features: D.
        num_experts: E.
        k: Mean number of experts per row, the capacity factor c of the paper.
        temperature: Divisor of the logits.
        balance: Coefficients of "z" and "kl". The load needs no loss.
        normalize: Whether the gate reads normalized rows; see `LinearRouter`.

    Raises:
        ValueError: If a size is below 1, k is not in (0, num_experts], the temperature is not positive, or a balance
            term is unknown. In an export, if the number of competing rows is dynamic.

    Example:
        >>> import torch
        >>> from moe_heads.routers import ExpertChoiceRouter
        >>> routing = ExpertChoiceRouter(16, 4, k=2)(torch.randn(10, 16))
        >>> routing.rows.shape, routing.stats().counts
        (torch.Size([4, 5]), tensor([5, 5, 5, 5]))
    """

    balance_terms = ("z", "kl")
    k: float

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        k: float = 2.0,
        temperature: float = 1.0,
        balance: Mapping[str, float] | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__(in_features, num_experts, temperature, balance, normalize=normalize)
        check_positive(k=k)
        if k > num_experts:
            raise ValueError(f"k: expected at most num_experts = {num_experts}, got {k}.")
        self.k = k

    def forward(self, x: Tensor, rows_per_sample: int = 1, mask: Tensor | None = None) -> Routing:
        """Route the rows x, (N, D), in fp32 or wider."""
        x = self.real_rows(x, mask)
        logits = self.gate_logits(x)
        probs = logits.softmax(-1)
        size = rows_per_sample if rows_per_sample > 1 else x.shape[0]
        # a traced graph accepts any batch size silently
        traced = torch.jit.is_tracing() and rows_per_sample == 1  # type: ignore[attr-defined,no-untyped-call]
        if traced or (torch.compiler.is_exporting() and not isinstance(size, int)):
            raise ValueError(
                "dynamic_shapes: expected a fixed number of rows that compete for the experts, since it decides how"
                " many rows an expert takes, got a dynamic one. Fix the batch size of pooled features, or the number"
                " of tokens of a sample."
            )
        groups = probs.unflatten(0, (-1, size)) if x.shape[0] else probs.new_zeros(0, max(size, 1), self.num_experts)
        # a row with nan would be the first choice of every expert
        ranked = groups.detach().nan_to_num(nan=-1.0)
        if mask is not None:
            mask_by_group = mask.view(ranked.shape[:2])
            ranked = ranked.masked_fill(~mask_by_group.unsqueeze(-1), -torch.inf)
        chosen = ranked.topk(self._num_taken(size), dim=1).indices
        if mask is not None:
            chosen = self._without_padding(chosen, mask_by_group)
        first = torch.arange(groups.shape[0], device=x.device).mul(size).view(-1, 1, 1)
        rows = (chosen + first).permute(2, 0, 1).flatten(1)
        return self.routing(
            logits,
            probs,
            rows_per_sample,
            mask,
            rows=rows,
            weights=self._weights(probs, rows),
            scores=ranked.flatten(0, 1),
        )

    def rechosen(self, routing: Routing, reference: Routing) -> Routing:
        """Return the rows of ``reference`` with their probabilities in ``routing``."""
        assert reference.rows is not None
        return replace(routing, rows=reference.rows, weights=self._weights(routing.probs, reference.rows))

    def _without_padding(self, chosen: Tensor, mask: Tensor) -> Tensor:
        """Replace choices beyond the number that the real rows alone would give by a padded row, which counts nowhere.

        Args:
            chosen: Rows by descending score within each group, (groups, M, E). Padded rows come last.
            mask: Real rows of each group, (groups, size).
        """
        num_taken = self._ceil_share(mask.sum(1))
        is_extra = torch.arange(chosen.shape[1], device=chosen.device).unsqueeze(0) >= num_taken.unsqueeze(1)
        # a group with choices to replace has a padded row, and argmin finds one
        padded = mask.to(torch.int8).argmin(1).view(-1, 1, 1)
        return torch.where(is_extra.unsqueeze(-1), padded, chosen)

    @staticmethod
    def _weights(probs: Tensor, rows: Tensor) -> Tensor:
        return probs.t().gather(-1, rows)

    def num_choices(self, batch: int, tokens: int) -> float:
        """Count the rows that all experts together take."""
        competing = batch if tokens == 1 else tokens
        return batch * tokens / competing * self.num_experts * self._num_taken(competing)

    def _num_taken(self, competing: int) -> int:
        return min(competing, self._ceil_share(competing))

    def _ceil_share(self, competing: N) -> N:
        """Return ⌈n k / E⌉ of a number or a tensor of integers."""
        # in integers, which are exact on every device: k = 1.1 means 1,100,000 millionths
        millionths = round(self.k * 10**6)
        return -(-competing * millionths // (10**6 * self.num_experts))

    def extra_repr(self) -> str:
        """Return the settings that the lines of the submodules do not show."""
        return f"k={self.k}, {super().extra_repr()}"

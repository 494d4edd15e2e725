"""Decisions of a router for one batch, with their gradient.

Shapes: B batch, T tokens, N = B·T rows, E experts, K chosen experts per row, M chosen rows per expert.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from moe_heads import balance
from moe_heads.checks import check_balance
from moe_heads.modes import can_read_without_sync
from moe_heads.routing.choices import highest, lowest, margin_of_choices, spread, sum_by_expert
from moe_heads.routing.loss_watch import LossWatch
from moe_heads.routing.stats import RoutingStats
from moe_heads.routing.third_party import fields_of_choices, fields_of_probs

__all__ = ["BALANCE_TERMS", "Routing"]


@dataclass(frozen=True)
class Routing:
    """Decisions of a router for one batch, with their gradient.

    There are three kinds: rows choose experts (``indices``), experts choose rows (``rows``), or every expert runs on
    every row (neither, a soft router).

    Attributes:
        logits: Clean logits z, (N, E), fp32 or wider.
        probs: Softmax over all experts of the logits that decide (the noisy ones in training), (N, E).
        indices: Experts that each row chose, (N, K), by descending score (in `fixed_routing`, that of the recording;
            in the order of a third-party router). With ``drops``, E stands for a choice that was dropped.
        rows: Rows that each expert chose, (E, M). With a mask, an expert with fewer rows than M names padded rows too.
        weights: Mixing weights of the choices, of the shape of ``indices`` or ``rows``. None for a soft router.
        scores: Scores that decide the choice, (N, E). None means the noisy logits, or the clean ones without noise.
        noisy_logits: Logits with noise, (N, E). None without noise.
        noise_std: Standard deviation of the noise, (N, E). None without noise.
        slot_logits: Logits of the slots of a soft router, (N, E, S). None for a sparse router.
        drops: Whether ``indices`` may contain dropped choices. Routers of this package drop none.
        balance: Coefficient of each term of `aux_loss`.
        rows_per_sample: T for tokens, 1 for pooled features. Rows n·T … n·T + T - 1 belong to sample n.
        mask: Rows that are real, (N,), bool. The others are padding: choices of them count nowhere. None means that all
            rows are real.
        sync: Whether `aux_loss` sums its statistics over the ranks first (in training).
        watch: Record of whether `aux_loss` gets a gradient. None outside training in eager mode.
    """

    logits: Tensor
    probs: Tensor
    indices: Tensor | None = None
    weights: Tensor | None = None
    rows: Tensor | None = None
    scores: Tensor | None = None
    noisy_logits: Tensor | None = None
    noise_std: Tensor | None = None
    slot_logits: Tensor | None = None
    drops: bool = False
    balance: Mapping[str, float] = field(default_factory=dict)
    rows_per_sample: int = 1
    mask: Tensor | None = None
    sync: bool = False
    watch: LossWatch | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.weights is None and (self.indices is not None or self.rows is not None):
            raise ValueError("weights: expected the mixing weights of the choices in indices or rows, got None.")

    @classmethod
    def from_probs(
        cls,
        probs: Tensor,
        indices: Tensor | None = None,
        weights: Tensor | None = None,
        rows_per_sample: int | None = None,
        scores: Tensor | None = None,
    ) -> "Routing":
        """Build the decisions of a third-party router, for an adapter of `collect_routing`.

        The logits are the logarithms of the given scores, so that margins are log ratios of probabilities, in nats. A
        row with a negative score, or with a nan or infinite weight, counts as a row with non-finite logits. Scores that
        do not sum to one are normalized.

        Args:
            probs: Softmax, or other non-negative scores, of all experts, (N, E), or (B, T, E) for tokens. The latter
                form tells which rows belong to a sample.
            indices: Experts that each row chose, without repetition, of the same shape except for the last dimension,
                K. -1 or E is a choice that the router dropped, because of a capacity for example. None for a soft
                router, which runs all of them.
            weights: Mixing weights of the choices, of the shape of ``indices``. By default their scores as given. A
                weight of zero also means that the choice was dropped, unless its score rounds to zero too.
            rows_per_sample: T, if the rows of B samples are consecutive, (B·T, E). By default T of (B, T, E), else 1.
            scores: Scores that decide the choice, of the shape of ``probs``, if these differ from them by more than a
                monotonic function: with a bias for the selection, for example (DeepSeek-V3). The margin is then in
                their unit. By default the logits. If a row did not choose its highest scores, these are not what the
                router compared, and the margin is nan: unknown.

        Raises:
            ValueError: If the shapes do not match, or (on a CPU, in eager mode) an index is out of range or repeated,
                or a score or weight is negative.

        Example:
            >>> import torch
            >>> routing = Routing.from_probs(torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0, 2]]))
            >>> routing.gates
            tensor([[0.7000, 0.0000, 0.1000]])
        """
        return cls(**fields_of_probs(probs, indices, weights, rows_per_sample, scores))

    @classmethod
    def from_choices(
        cls, indices: Tensor, num_experts: int, weights: Tensor | None = None, rows_per_sample: int | None = None
    ) -> "Routing":
        """Build the decisions of a third-party router of which only the choices are known.

        Load and importance are known then. Logits are placeholders, and probabilities and scores are nan: entropy and
        margin are unknown.

        Args:
            indices: Experts that each row chose, (N, K), or (B, T, K) for tokens, without repetition. -1 or E is a
                choice that was dropped.
            num_experts: E.
            weights: Mixing weights of the choices, of the shape of ``indices``. A weight of zero is a dropped choice
                too. By default 1/K.
            rows_per_sample: T, if the rows of B samples are consecutive. By default T of (B, T, K), else 1.

        Raises:
            ValueError: If the shapes do not match, or (on a CPU, in eager mode) an index is out of range or repeated,
                or a weight is negative.

        Example:
            >>> import torch
            >>> stats = Routing.from_choices(torch.tensor([[0, 2], [2, -1]]), num_experts=3).stats()
            >>> stats.counts, stats.num_dropped_choices
            (tensor([1, 0, 2]), tensor(1))
        """
        return cls(**fields_of_choices(indices, num_experts, weights, rows_per_sample))

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return self.logits.shape[-1]

    @property
    def deciding_logits(self) -> Tensor:
        """Noisy logits, or the clean ones without noise, (N, E)."""
        return self.logits if self.noisy_logits is None else self.noisy_logits

    @property
    def soft(self) -> bool:
        """True if every expert runs on every row."""
        return self.weights is None

    @property
    def gates(self) -> Tensor:
        """Mixing weights of all experts, (N, E), zero where an expert was not chosen."""
        if self.weights is None:
            return self.probs
        return self._spread(self.weights)

    @property
    def selected(self) -> Tensor:
        """Mask of the chosen pairs of row and expert, (N, E), bool. A soft router chooses its largest gate."""
        if self.weights is None:
            best = self.probs.argmax(-1, keepdim=True)
            return torch.zeros_like(self.probs, dtype=torch.bool).scatter(-1, best, True)
        return self._spread(torch.ones_like(self.weights, dtype=torch.bool))

    @property
    def top(self) -> Tensor:
        """Expert with the largest gate of each row, (N,), int64. It is 0 for a dropped row."""
        return self.gates.argmax(-1)

    @property
    def dropped(self) -> Tensor:
        """Mask of the real rows that no expert took, (N,), bool: by expert choice, or because of a capacity."""
        dropped = ~self.selected.any(-1)
        return dropped if self.mask is None else dropped & self.mask

    @property
    def valid(self) -> Tensor:
        """Mask of the real rows with finite logits, (N,), bool. Only these rows count in statistics and losses."""
        finite = self._finite
        return finite if self.mask is None else finite & self.mask

    @property
    def _finite(self) -> Tensor:
        # twice as fast as isfinite().all(-1); the maximum of a row with nan is nan
        return self.logits.abs().amax(-1).isfinite()

    @property
    def margin(self) -> Tensor:
        """Distance of each row from a different choice, (N,), in the unit of the compared scores.

        If rows choose, it is the lowest chosen score minus the highest score that was not chosen. If experts choose, it
        is the smallest change of one score of the row that would change the choice of an expert. It is infinite if no
        other choice exists, as for k = E.
        """
        return self._margin(self.selected)

    @property
    def agrees_without_noise(self) -> Tensor:
        """Mask of the rows with the same choice by their clean logits, (N,), bool. All True unless rows choose."""
        if self.indices is None:
            return torch.ones(len(self.logits), dtype=torch.bool, device=self.logits.device)
        return margin_of_choices(self.logits, self.indices, self.drops) >= 0

    @property
    def aux_loss(self) -> Tensor:
        """Sum of the balance terms times their coefficients, scalar. See `moe_heads.balance`.

        In training under DDP every read sums over the ranks, so every rank must read it equally often.
        """
        check_balance(self.balance, tuple(BALANCE_TERMS))
        terms = [coefficient * BALANCE_TERMS[name](self) for name, coefficient in self.balance.items() if coefficient]
        if not terms:
            return self.logits.new_zeros(())
        loss = torch.stack(terms).sum()
        if self.watch is not None and not torch.compiler.is_compiling():
            self.watch.attach(loss)
        return loss

    def detach(self) -> "Routing":
        """Return the same decisions without their gradient and graph.

        They may be used in a graph, even if they were made in inference mode.
        """
        # autograd cannot save an inference tensor, but it can save a copy
        return self.map(lambda t: t.clone() if t.is_inference() else t.detach())

    def map(self, function: Callable[[Tensor], Tensor]) -> "Routing":
        """Return the same decisions with a function applied to every tensor."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        mapped: dict[str, Any] = {name: function(tensor) for name, tensor in tensors.items()}
        return replace(self, **mapped)

    @torch.no_grad()
    def stats(self) -> RoutingStats:
        """Compute the statistics of this batch, without synchronizing with the host."""
        all_valid = self._is_known_valid()
        valid = torch.ones(len(self.logits), dtype=torch.bool) if all_valid else self.valid
        invalid = None if all_valid else ~valid
        num_rows = valid.sum()
        num_real = len(valid) if self.mask is None else self.mask.sum()

        def counted(values: Tensor) -> Tensor:
            """Set the rows that do not count to zero."""
            return values if invalid is None else values.masked_fill(invalid.view(-1, *[1] * (values.dim() - 1)), 0)

        wide = torch.float32 if self.logits.device.type == "mps" else torch.float64
        probs = counted(self.probs)
        if self.logits.device.type == "cpu" and self.indices is not None and self.weights is not None:
            # takes a fifth of the time; on a GPU the many additions to few counters would be serialized
            ones = torch.ones((), dtype=torch.int64).expand(self.indices.shape)
            choices = self.indices, self.num_experts, self.drops
            counts, gate_sum = (sum_by_expert(v, *choices) for v in (counted(ones), counted(self.weights).to(wide)))
            num_dropped, margin = torch.tensor(0), margin_of_choices(self._scores, self.indices, self.drops)
            if self.drops:
                num_dropped = ((self.indices == self.num_experts).all(-1) & valid).sum()
        else:
            selected = self.selected
            counts, gate_sum = counted(selected).sum(0), counted(self.gates).sum(0, dtype=wide)
            num_dropped, margin = (~selected.any(-1) & valid).sum(), self._margin(selected)
        return RoutingStats(
            counts=counts,
            gate_sum=gate_sum,
            prob_sum=probs.sum(0, dtype=wide),
            # one sum over all elements, since a sum over rows of a few experts each is slow; entr takes twice as long
            entropy_sum=-(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(dtype=wide),
            margin_sum=counted(margin).sum(dtype=wide),
            num_dropped=num_dropped,
            num_dropped_choices=self._num_dropped_choices(valid),
            num_rows=num_rows,
            num_nonfinite=num_real - num_rows,
        )

    def _num_dropped_choices(self, valid: Tensor) -> Tensor:
        if not self.drops or self.indices is None:
            return torch.zeros((), dtype=torch.int64, device=self.logits.device)
        return ((self.indices == self.num_experts) & valid.unsqueeze(-1)).sum()

    def _is_known_valid(self) -> bool:
        """Return True if the host knows without synchronizing with a device that all rows are real and finite."""
        # the sum is not finite if a logit is not; if it overflows, the rows are checked one by one
        is_readable = can_read_without_sync(self.logits)
        return self.mask is None and is_readable and bool(self.logits.sum().isfinite())

    def _margin(self, selected: Tensor) -> Tensor:
        scores = self._scores
        if self.indices is not None:
            return margin_of_choices(scores, self.indices, self.drops)
        if self.rows is None:
            return lowest(scores, selected, -1).squeeze(-1) - highest(scores, ~selected, -1).squeeze(-1)
        # the rows that compete with each other: those of a sample of tokens, else those of the batch
        shape = (-1, self.rows_per_sample if self.rows_per_sample > 1 else max(len(scores), 1), self.num_experts)
        scores, selected = scores.reshape(shape), selected.reshape(shape)
        real = True if self.mask is None else self.mask.reshape(*shape[:2], 1)
        leaving = scores - highest(scores, ~selected & real, 1)
        entering = lowest(scores, selected & real, 1) - scores
        return torch.where(selected, leaving, entering).amin(-1).flatten()

    @property
    def _scores(self) -> Tensor:
        return self.deciding_logits if self.scores is None else self.scores

    def _spread(self, values: Tensor) -> Tensor:
        """Scatter the values of the choices to all rows and experts, (N, E), with zeros elsewhere."""
        if self.rows is not None:
            zeros = torch.zeros(self.probs.shape, dtype=values.dtype, device=values.device)
            return zeros.t().scatter(-1, self.rows, values).t().contiguous()
        assert self.indices is not None
        return spread(values, self.indices, self.num_experts, self.drops)


def _load(routing: Routing) -> Tensor:
    if routing.noisy_logits is None or routing.noise_std is None or routing.indices is None:
        # in the limit of vanishing noise the load is the counts, which have no gradient
        counts = routing.selected.to(routing.probs.dtype)
        return balance.importance_loss(counts, routing.valid, routing.sync)
    k = routing.indices.shape[-1]
    return balance.load_loss(routing.logits, routing.noisy_logits, routing.noise_std, k, routing.valid, routing.sync)


BALANCE_TERMS: Mapping[str, Callable[[Routing], Tensor]] = {
    "importance": lambda r: balance.importance_loss(r.gates, r.valid, r.sync),
    "load": _load,
    "switch": lambda r: balance.switch_loss(r.probs, r.selected, r.valid, r.sync),
    "z": lambda r: balance.z_loss(r.logits, r.valid, r.sync),
    "kl": lambda r: balance.kl_uniform_loss(r.probs, r.valid, r.sync),
}
"""Balance losses by their name in the ``balance`` argument of a head."""

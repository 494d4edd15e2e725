"""A router's decisions for one batch, with their gradient.

Shapes: B batch, T tokens, N = B·T rows, E experts, K chosen experts a row, M chosen rows an expert.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from moe_heads import balance
from moe_heads.checks import check_balance
from moe_heads.modes import can_read_values
from moe_heads.routing.stats import RoutingStats

__all__ = ["BALANCE_TERMS", "Routing"]


@dataclass(frozen=True)
class Routing:
    """A router's decisions for one batch, with their gradient.

    There are three kinds: rows choose experts (``indices``), experts choose rows (``rows``), or every expert runs on
    every row (neither, a soft router).

    Attributes:
        logits: Clean logits z, (N, E), fp32 or wider.
        probs: Softmax over all experts of the logits that decided (noisy ones in training), (N, E).
        indices: Experts that each row chose, (N, K), by descending score (in `fixed_routing`, that of the record).
        rows: Rows that each expert chose, (E, M).
        weights: Mixing weights of the choices, of the shape of ``indices`` or ``rows``; None for a soft router.
        scores: What was compared to choose, (N, E); None: the noisy logits, or the clean ones without noise.
        noisy_logits: Logits with noise, (N, E); None when no noise was drawn.
        noise_std: Standard deviation of the noise, (N, E); None when no noise was drawn.
        slot_logits: Logits of the slots of a soft router, (N, E, S); None for a sparse router.
        balance: Coefficient of each term of `aux_loss`.
        rows_per_sample: T for tokens, 1 for pooled features: rows n·T … n·T + T - 1 belong to sample n.
        sync: Whether `aux_loss` sums its statistics over the ranks first (in training).
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
    balance: Mapping[str, float] = field(default_factory=dict)
    rows_per_sample: int = 1
    sync: bool = False

    def __post_init__(self) -> None:
        if self.weights is None and (self.indices is not None or self.rows is not None):
            raise ValueError("weights: expected those of the choices in indices or rows, got None")

    @classmethod
    def from_probs(
        cls,
        probs: Tensor,
        indices: Tensor | None = None,
        weights: Tensor | None = None,
        rows_per_sample: int | None = None,
    ) -> "Routing":
        """The decisions of a router that is not of this package, for an adapter of `collect_routing`.

        The logits are the logarithms of what is given, so that margins are ratios of probabilities, in nats; a row with
        a negative score, or a weight that is nan or infinite, counts as one without finite logits. Scores that do not
        sum to one are normalized.

        Args:
            probs: Softmax, or other scores from 0 on, of all experts, (N, E), or (B, T, E) for tokens: then what
                belongs to a sample is known.
            indices: Experts that each row chose, none twice, of the same shape but for the last dimension, K; None for
                a soft router, which runs all.
            weights: Mixing weights of the choices, of the shape of ``indices``; by default their scores as given.
            rows_per_sample: T, where the rows of B samples are one after the other, (B·T, E); by default T of (B, T,
                E), else 1.

        Raises:
            ValueError: If the shapes do not fit, or (on a CPU, in eager mode) an index is out of range or there twice,
                or a score or weight is negative.

        Example:
            >>> import torch
            >>> routing = Routing.from_probs(torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0, 2]]))
            >>> routing.gates
            tensor([[0.7000, 0.0000, 0.1000]])
        """
        if probs.dim() not in (2, 3) or not probs.is_floating_point():
            raise ValueError(f"probs: expected (N, E) or (B, T, E), floating, got {tuple(probs.shape)}, {probs.dtype}")
        if indices is not None:
            _check_indices(indices, probs)
        if weights is not None and (indices is None or weights.shape != indices.shape):
            raise ValueError(f"weights: expected the shape of indices, got {tuple(weights.shape)}")
        _check_signs("probs", probs, ": pass logits.softmax(-1), not logits")
        if weights is not None:
            _check_signs("weights", weights)
        if rows_per_sample is None:
            rows_per_sample = probs.shape[1] if probs.dim() == 3 else 1
        probs = probs.flatten(0, -2)
        if rows_per_sample < 1 or len(probs) % rows_per_sample:
            raise ValueError(f"rows_per_sample: expected a divisor of the {len(probs)} rows, got {rows_per_sample}")
        if indices is not None:
            indices = indices.flatten(0, -2)
            weights = probs.gather(-1, indices) if weights is None else weights.flatten(0, -2)
        tiny = torch.finfo(probs.dtype).tiny
        # a score that is zero in its precision is no row without finite logits; the logarithm of a negative one is nan
        logits = torch.where(probs == 0, tiny, probs).log()
        if weights is not None:
            logits = torch.where(weights.isfinite().all(-1, keepdim=True), logits, torch.nan)
        probs = probs / probs.sum(-1, keepdim=True).clamp_min(tiny)
        return cls(logits, probs, indices, weights, rows_per_sample=rows_per_sample)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.logits.shape[-1]

    @property
    def deciding_logits(self) -> Tensor:
        """The noisy logits, or the clean ones without noise, (N, E)."""
        return self.logits if self.noisy_logits is None else self.noisy_logits

    @property
    def soft(self) -> bool:
        """Whether every expert runs on every row."""
        return self.weights is None

    @property
    def gates(self) -> Tensor:
        """Mixing weights of all experts, (N, E), zero where an expert was not chosen."""
        if self.weights is None:
            return self.probs
        return self._spread(self.weights)

    @property
    def selected(self) -> Tensor:
        """Whether a row chose an expert, or the expert the row, (N, E), bool; a soft router's is the largest gate."""
        if self.weights is None:
            best = self.probs.argmax(-1, keepdim=True)
            return torch.zeros_like(self.probs, dtype=torch.bool).scatter(-1, best, True)
        return self._spread(torch.ones_like(self.weights, dtype=torch.bool))

    @property
    def top(self) -> Tensor:
        """Expert with the largest gate of each row, (N,), int64; 0 for a dropped row."""
        return self.gates.argmax(-1)

    @property
    def dropped(self) -> Tensor:
        """Rows that no expert took, (N,), bool: possible where experts choose rows."""
        return ~self.selected.any(-1)

    @property
    def valid(self) -> Tensor:
        """Rows whose logits are finite, (N,)."""
        # twice as fast as isfinite().all(-1); the largest of a row with nan is nan
        return self.logits.abs().amax(-1).isfinite()

    @property
    def margin(self) -> Tensor:
        """How far the choice of each row is from another one, (N,), in the unit of the scores that were compared.

        Where rows choose, the lowest score that was chosen less the highest that was not. Where experts choose, the
        smallest change of one score of the row that would bring it into an expert's choice or out of it. Infinite where
        no other choice exists, as for k = E.
        """
        return self._margin(self.selected)

    @property
    def agrees_without_noise(self) -> Tensor:
        """Whether a row that chooses would choose the same experts by its clean logits, (N,), bool; True otherwise."""
        if self.indices is None:
            return torch.ones(len(self.logits), dtype=torch.bool, device=self.logits.device)
        return self._margin_of(self.logits, self.indices) >= 0

    @property
    def aux_loss(self) -> Tensor:
        """Sum of the balance terms times their coefficients, scalar; see `moe_heads.balance`.

        In training under DDP it is summed over the ranks every time it is read: every rank has to read it as often.
        """
        check_balance(self.balance, tuple(BALANCE_TERMS))
        terms = [coefficient * BALANCE_TERMS[name](self) for name, coefficient in self.balance.items() if coefficient]
        return torch.stack(terms).sum() if terms else self.logits.new_zeros(())

    def detach(self) -> "Routing":
        """The same decisions without their gradient and the graph behind it.

        They may enter a graph, also when they were made in inference mode.
        """
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        # autograd does not save an inference tensor; its copy it does
        detached: dict[str, Any] = {name: t.clone() if t.is_inference() else t.detach() for name, t in tensors.items()}
        return replace(self, **detached)

    @torch.no_grad()
    def stats(self) -> RoutingStats:
        """Statistics of this batch; no synchronization with the host."""
        all_valid = self._is_known_valid()
        valid = torch.ones(len(self.logits), dtype=torch.bool) if all_valid else self.valid
        invalid = None if all_valid else ~valid
        num_rows = valid.sum()

        def counted(values: Tensor) -> Tensor:
            """Zero in the rows that do not count."""
            return values if invalid is None else values.masked_fill(invalid.view(-1, *[1] * (values.dim() - 1)), 0)

        wide = torch.float32 if self.logits.device.type == "mps" else torch.float64
        probs = counted(self.probs)
        if self.logits.device.type == "cpu" and self.indices is not None and self.weights is not None:
            # a fifth of the time; on a GPU all rows would wait for the few numbers that they are added to
            ones = torch.ones((), dtype=torch.int64).expand(self.indices.shape)
            counts, gate_sum = self._by_expert(counted(ones)), self._by_expert(counted(self.weights).to(wide))
            num_dropped, margin = torch.tensor(0), self._margin_of(self._scores, self.indices)
        else:
            selected = self.selected
            counts, gate_sum = counted(selected).sum(0), counted(self.gates).sum(0, dtype=wide)
            num_dropped, margin = (~selected.any(-1) & valid).sum(), self._margin(selected)
        return RoutingStats(
            counts=counts,
            gate_sum=gate_sum,
            prob_sum=probs.sum(0, dtype=wide),
            # over all at once, since a sum over rows of a few experts each is slow; entr takes twice as long
            entropy_sum=-(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(dtype=wide),
            margin_sum=counted(margin).sum(dtype=wide),
            num_dropped=num_dropped,
            num_rows=num_rows,
            num_nonfinite=len(valid) - num_rows,
        )

    def _is_known_valid(self) -> bool:
        """Whether all rows are valid, where the host can tell at once: a device would have to be waited for."""
        # the sum is not finite if a logit is not; it may overflow, then the rows tell
        on_host = self.logits.device.type == "cpu" and can_read_values(self.logits)
        return on_host and bool(self.logits.sum().isfinite())

    def _margin(self, selected: Tensor) -> Tensor:
        scores = self._scores
        if self.indices is not None:
            return self._margin_of(scores, self.indices)
        if self.rows is None:
            return _lowest(scores, selected, -1).squeeze(-1) - _highest(scores, ~selected, -1).squeeze(-1)
        # the rows that compete for a place: those of a sample of tokens, else those of the batch
        shape = (-1, self.rows_per_sample if self.rows_per_sample > 1 else max(len(scores), 1), self.num_experts)
        scores, selected = scores.reshape(shape), selected.reshape(shape)
        leaving = scores - _highest(scores, ~selected, 1)
        entering = _lowest(scores, selected, 1) - scores
        return torch.where(selected, leaving, entering).amin(-1).flatten()

    @staticmethod
    def _margin_of(scores: Tensor, indices: Tensor) -> Tensor:
        """The lowest chosen score less the highest other one, (N,); gathered, since masks over all experts are slow."""
        return scores.gather(-1, indices).amin(-1) - scores.scatter(-1, indices, -torch.inf).amax(-1)

    @property
    def _scores(self) -> Tensor:
        return self.deciding_logits if self.scores is None else self.scores

    def _by_expert(self, values: Tensor) -> Tensor:
        """Sums of the values of the rows' choices by expert, (E,)."""
        assert self.indices is not None
        return values.new_zeros(self.num_experts).index_add_(0, self.indices.flatten(), values.flatten())

    def _spread(self, values: Tensor) -> Tensor:
        """Values of the choices at their places among all rows and experts, (N, E), zero elsewhere."""
        zeros = torch.zeros(self.probs.shape, dtype=values.dtype, device=values.device)
        if self.rows is not None:
            return zeros.t().scatter(-1, self.rows, values).t().contiguous()
        assert self.indices is not None
        return zeros.scatter(-1, self.indices, values)


def _check_indices(indices: Tensor, probs: Tensor) -> None:
    is_whole = not indices.is_floating_point() and indices.dtype != torch.bool
    if indices.shape[:-1] != probs.shape[:-1] or not is_whole or not 1 <= indices.shape[-1] <= probs.shape[-1]:
        raise ValueError(
            f"indices: expected whole numbers, {tuple(probs.shape[:-1])} and one more dimension, 1 to"
            f" {probs.shape[-1]}, got {tuple(indices.shape)}, {indices.dtype}"
        )
    if indices.device.type == "cpu" and can_read_values(indices) and len(indices):
        lowest, highest = (int(bound) for bound in indices.aminmax())
        if lowest < 0 or highest >= probs.shape[-1]:
            raise ValueError(f"indices: expected 0 to {probs.shape[-1] - 1}, got {lowest} to {highest}")
        if bool((indices.sort(-1).values.diff() == 0).any()):
            raise ValueError("indices: expected every expert at most once a row, got rows with one of them twice")


def _check_signs(name: str, values: Tensor, advice: str = "") -> None:
    if values.device.type == "cpu" and can_read_values(values) and bool((values < 0).any()):
        raise ValueError(f"{name}: expected numbers from 0 on, got {float(values.min()):.3g}{advice}")


def _lowest(scores: Tensor, among: Tensor, dim: int) -> Tensor:
    return torch.where(among, scores, torch.inf).amin(dim, keepdim=True)


def _highest(scores: Tensor, among: Tensor, dim: int) -> Tensor:
    return torch.where(among, scores, -torch.inf).amax(dim, keepdim=True)


def _load(routing: Routing) -> Tensor:
    if routing.noisy_logits is None or routing.noise_std is None or routing.indices is None:
        # the limit of vanishing noise: the counts themselves, which have no gradient
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
"""Names under which a head's ``balance`` argument selects its losses."""

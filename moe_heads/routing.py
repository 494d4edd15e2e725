"""What a router did: the decisions for one batch, their statistics, and how to collect both from any model.

Shapes: B batch, T tokens, N = B·T rows, E experts, K chosen experts a row.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from moe_heads import balance

__all__ = ["Router", "Routing", "RoutingCollection", "RoutingStats", "collect_routing"]


@dataclass(frozen=True)
class RoutingStats:
    """Sums over rows of what a router did; detached, on the router's device, exact under addition.

    Add the statistics of several batches (or ranks) with ``+``; the properties are ratios of the sums.

    Attributes:
        counts: Rows that chose the expert, (E,), int64. A soft router chooses the expert with the largest gate.
        gate_sum: Sum of the mixing weights, (E,): Shazeer's importance.
        entropy_sum: Sum over rows of the entropy of the full softmax, scalar, nats.
        num_rows: Rows routed, scalar, int64.
        num_nonfinite: Rows with NaN or infinite logits; they count in none of the other sums.
    """

    counts: Tensor
    gate_sum: Tensor
    entropy_sum: Tensor
    num_rows: Tensor
    num_nonfinite: Tensor

    def __add__(self, other: "RoutingStats") -> "RoutingStats":
        return RoutingStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def load(self) -> Tensor:
        """Share of the choices that went to each expert, (E,); sums to 1."""
        return self.counts / self.counts.sum().clamp_min(1)

    @property
    def importance(self) -> Tensor:
        """Share of the mixing weight that went to each expert, (E,); sums to 1."""
        return self.gate_sum / self.gate_sum.sum().clamp_min(torch.finfo(self.gate_sum.dtype).tiny)

    @property
    def entropy(self) -> Tensor:
        """Mean entropy of a row's full softmax, scalar, nats."""
        return self.entropy_sum / self.num_rows.clamp_min(1)


@dataclass(frozen=True)
class Routing:
    """A router's decisions for one batch, with their gradient.

    Attributes:
        logits: Clean logits z, (N, E), fp32 or wider.
        probs: Softmax over all experts of the logits that decided (noisy ones in training), (N, E).
        indices: Chosen experts, (N, K), by descending logit; None for a soft router, which runs all of them.
        weights: Mixing weights of the chosen experts, (N, K); None for a soft router.
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
    noisy_logits: Tensor | None = None
    noise_std: Tensor | None = None
    slot_logits: Tensor | None = None
    balance: Mapping[str, float] = field(default_factory=dict)
    rows_per_sample: int = 1
    sync: bool = False

    @property
    def num_experts(self) -> int:
        """E."""
        return self.logits.shape[-1]

    @property
    def gates(self) -> Tensor:
        """Mixing weights of all experts, (N, E), zero where an expert was not chosen."""
        if self.indices is None or self.weights is None:
            return self.probs
        return torch.zeros_like(self.probs).scatter(-1, self.indices, self.weights)

    @property
    def chosen(self) -> Tensor:
        """Chosen experts, (N, K); for a soft router the one with the largest gate, (N, 1)."""
        return self.probs.argmax(-1, keepdim=True) if self.indices is None else self.indices

    @property
    def counts(self) -> Tensor:
        """One where a row chose an expert, else zero: (N, E), int64."""
        chosen = self.chosen
        zeros = torch.zeros(self.probs.shape, dtype=torch.int64, device=self.probs.device)
        return zeros.scatter(-1, chosen, torch.ones_like(chosen))

    @property
    def valid(self) -> Tensor:
        """Rows whose logits are finite, (N,)."""
        return self.logits.isfinite().all(-1)

    @property
    def aux_loss(self) -> Tensor:
        """Sum of the balance terms times their coefficients, scalar; see `moe_heads.balance`."""
        terms = [coefficient * BALANCE_TERMS[name](self) for name, coefficient in self.balance.items() if coefficient]
        return torch.stack(terms).sum() if terms else self.logits.new_zeros(())

    @torch.no_grad()
    def stats(self) -> RoutingStats:
        """Statistics of this batch; no synchronisation with the host."""
        valid = self.valid
        row = valid.unsqueeze(-1)
        entropy = torch.special.entr(self.probs).sum(-1)
        return RoutingStats(
            counts=self.counts.masked_fill(~row, 0).sum(0),
            gate_sum=self.gates.masked_fill(~row, 0).sum(0),
            entropy_sum=entropy.masked_fill(~valid, 0).sum(),
            num_rows=valid.sum(),
            num_nonfinite=(~valid).sum(),
        )


def _load(routing: Routing) -> Tensor:
    if routing.noisy_logits is None or routing.noise_std is None:
        # the limit of vanishing noise: the counts themselves, which have no gradient
        return balance.importance_loss(routing.counts.to(routing.probs.dtype), routing.valid, routing.sync)
    k = routing.chosen.shape[-1]
    return balance.load_loss(routing.logits, routing.noisy_logits, routing.noise_std, k, routing.valid, routing.sync)


BALANCE_TERMS: Mapping[str, Callable[[Routing], Tensor]] = {
    "importance": lambda r: balance.importance_loss(r.gates, r.valid, r.sync),
    "load": _load,
    "switch": lambda r: balance.switch_loss(r.probs, r.counts, r.valid, r.sync),
    "z": lambda r: balance.z_loss(r.logits, r.valid, r.sync),
    "kl": lambda r: balance.kl_uniform_loss(r.probs, r.valid, r.sync),
}
"""Names under which a head's ``balance`` argument selects its losses."""


class Router(nn.Module, ABC):
    """Base of all routers: a module from rows (N, D) to a `Routing`. `collect_routing` finds them by this class."""

    @abstractmethod
    def forward(self, x: Tensor, rows_per_sample: int = 1) -> Routing:
        """Route the rows x, (N, D)."""


class RoutingCollection:
    """What the routers of a model did while `collect_routing` was active.

    Attributes:
        routings: The `Routing` of every forward pass, by the name of the head that owns the router ("head" when the
            model is itself the head).
    """

    def __init__(self) -> None:
        self.routings: dict[str, list[Routing]] = {}

    @property
    def aux_loss(self) -> Tensor:
        """Sum of the balance losses of all heads and passes, scalar; zero for a model without a router."""
        losses = [routing.aux_loss for routings in self.routings.values() for routing in routings]
        return torch.stack(losses).sum() if losses else torch.zeros(())

    @property
    def stats(self) -> dict[str, RoutingStats]:
        """Statistics of each head, summed over the passes."""
        return {name: _total([r.stats() for r in routings]) for name, routings in self.routings.items() if routings}


@contextmanager
def collect_routing(model: nn.Module) -> Iterator[RoutingCollection]:
    """Collect what the routers inside ``model`` do while the block runs.

    Works by forward hooks on the routers, removed when the block ends, however it ends: no global state, and the
    model keeps nothing of the batch.

    Args:
        model: Any module; heads may sit at any depth.

    Yields:
        The collection, filled by the forward passes inside the block.

    Example:
        >>> import torch
        >>> from moe_heads import SparseMoE, collect_routing
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), SparseMoE(16, 3, num_experts=4, expert_width=8))
        >>> with collect_routing(model) as routing:
        ...     logits = model(torch.randn(5, 4))
        >>> routing.stats["1"].counts.sum()
        tensor(10)
        >>> routing.aux_loss.requires_grad
        True
    """
    collection = RoutingCollection()
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if isinstance(module, Router):
                owner = path.rpartition(".")[0] or "head"
                # a module with two routers: the second goes by its own name
                name = path if owner in collection.routings else owner
                recorded = collection.routings[name] = []
                stack.callback(module.register_forward_hook(_recorder(recorded)).remove)
        yield collection


def _recorder(recorded: list[Routing]) -> Callable[[nn.Module, object, Routing], None]:
    def record(module: nn.Module, args: object, output: Routing) -> None:
        recorded.append(output)

    return record


def _total(stats: list[RoutingStats]) -> RoutingStats:
    total = stats[0]
    for more in stats[1:]:
        total = total + more
    return total

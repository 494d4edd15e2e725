"""The routers of a model over its training epochs: what is drawn, kept and told of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from torch import nn
from torch.optim import Optimizer

from moe_heads.analysis._shared.batches import Batch
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.expert_utilization.advice import remedies_for
from moe_heads.analysis.expert_utilization.flips import EpochChoices
from moe_heads.analysis.expert_utilization.health import RouterHealth
from moe_heads.analysis.expert_utilization.rows import of_samples
from moe_heads.analysis.expert_utilization.watch import RouterKind, RoutingWatch
from moe_heads.routing import Adapters, RoutingCollection, RoutingStats, adapted_routers, named_routers

__all__ = ["EpochReport", "TrainingRouters"]


@dataclass(frozen=True)
class EpochReport:
    """One router over one epoch, all ranks together.

    Attributes:
        stats: Its statistics.
        scalars: The numbers to draw.
        news: What is wrong with its experts and was not yet told.
    """

    stats: RoutingStats
    scalars: dict[str, float]
    news: tuple[str, ...]


class TrainingRouters:
    """Follows the routers of a model through training and validation.

    Args:
        model: The model.
        collection: What `collect_routing` fills while the model runs.
        adapters: As given to `collect_routing`.
        dead_below: Fraction of the fair share under which an expert is dead.
        starved_below: Fraction under which it is starved.

    Attributes:
        has_other_data: Whether, on any rank, the last validation of the epoch that ended last was on other data than
            the one before it.
        are_silent: Whether training batches came in the epoch that ended last and no router ran in any.
    """

    def __init__(
        self,
        model: nn.Module,
        collection: RoutingCollection,
        adapters: Adapters | None,
        dead_below: float,
        starved_below: float,
    ) -> None:
        self._collection, self.has_other_data, self.are_silent = collection, False, False
        self._num_batches = 0
        self._bounds = dead_below, starved_below
        self._health: dict[str, RouterHealth] = {}
        self._routers: dict[str, nn.Module] = {**named_routers(model)}
        self._foreign = {name: router for name, (router, _) in adapted_routers(model, adapters).items()}
        self._routers |= self._foreign
        self._watch, self._validation_watch = RoutingWatch(), RoutingWatch()
        self._in_evaluation: dict[str, RoutingStats] = {}
        self._choices = {name: EpochChoices() for name in self._routers}
        self._flips: dict[str, tuple[int, int]] = {}
        collection.paused = True

    def begin_batch(self) -> None:
        """Listen to the passes that follow."""
        for passes in self._collection.routings.values():
            passes.clear()
        self._collection.paused = False

    def end_training_batch(self) -> None:
        """Take what was heard of a training batch."""
        self._collection.paused = True
        self._num_batches += 1
        self._watch.take(self._collection)

    def end_validation_batch(self, batch: Batch) -> None:
        """Take what was heard of a validation batch."""
        self._collection.paused = True
        for name, passes in self._collection.routings.items():
            if name in self._foreign:
                passes[:] = [of_samples(routing, batch) for routing in passes]
            self._choices[name].add(passes, batch)
        self._validation_watch.take(self._collection)

    def end_validation(self) -> None:
        """Compare the choices with those of the validation before, and sum up what the routers did."""
        self._flips = {name: choices.end_epoch() for name, choices in self._choices.items()}
        watch = self._validation_watch
        watch.count()
        self._in_evaluation = {name: watch.metric(name, kind).stats.cpu() for name, kind in watch.kinds.items()}
        watch.reset()

    def note_gradients(self, optimizer: Optimizer) -> None:
        """Note the gradients that an optimizer is about to follow."""
        self._watch.note_gradients(self._routers, optimizer)

    def end_epoch(self, ranks: Ranks) -> dict[str, EpochReport]:
        """What the epoch showed of each router that ran; then the next one begins. Every rank has to call it."""
        # a module may end its epoch in on_train_batch_start: the batch then has no end
        self._collection.paused = True
        self._watch.count()
        of_this_rank = _RankEpoch(
            self._watch.kinds, self._watch.gradient_norms(), self._flips, self._in_evaluation, self._has_other_data
        )
        # what ran on one rank alone is told by all: they have to add up, and log, the same
        found = ranks.gather(of_this_rank)
        self.has_other_data = any(rank.has_other_data for rank in found)
        self.are_silent = bool(self._routers) and self._num_batches > 0 and not any(rank.kinds for rank in found)
        self._num_batches = 0
        kinds = {name: kind for rank in found for name, kind in rank.kinds.items()}
        reports: dict[str, EpochReport] = {}
        for name, kind in sorted(kinds.items()):
            metric = self._watch.metric(name, kind)
            scalars = {key: float(value) for key, value in metric.compute().items()}
            stats = metric.stats.all_reduce().cpu()
            scalars |= _mean("router_gradient_norm", [rank.norms[name] for rank in found if name in rank.norms])
            scalars |= _mean("routing_flips", [rank.flips[name] for rank in found if name in rank.flips])
            if int(stats.num_rows) or int(stats.num_nonfinite):
                evaluated = [rank.in_evaluation[name] for rank in found if name in rank.in_evaluation]
                health = self._health_of(name, kind.soft)
                news = health.news(stats, reduce(add, evaluated) if evaluated else None)
                reports[name] = EpochReport(stats, scalars | health.counts(stats), tuple(news))
        self._watch.reset()
        self._flips, self._in_evaluation = {}, {}
        return reports

    def _health_of(self, name: str, soft: bool) -> RouterHealth:
        if name not in self._health:
            remedies = remedies_for(self._routers[name], soft)
            self._health[name] = RouterHealth(soft, remedies, *self._bounds)
        return self._health[name]

    @property
    def _has_other_data(self) -> bool:
        return any(choices.has_other_data for choices in self._choices.values())


@dataclass(frozen=True)
class _RankEpoch:
    """What one rank tells the others of an epoch, by the name of the router: norms and flips with their counts.

    The statistics in evaluation are those of the last validation.
    """

    kinds: dict[str, RouterKind]
    norms: dict[str, tuple[float, int]]
    flips: dict[str, tuple[int, int]]
    in_evaluation: dict[str, RoutingStats]
    has_other_data: bool


def _mean(name: str, parts: Sequence[tuple[float, int]]) -> dict[str, float]:
    """The mean of all parts, each a sum and a count; nothing where nothing was counted."""
    count = sum(number for _, number in parts)
    return {name: sum(total for total, _ in parts) / count} if count else {}

"""Routers of a model over its training epochs: statistics, numbers to log, and warnings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from torch import nn
from torch.optim import Optimizer

from moe_heads.analysis._shared.batches import Batch
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.expert_utilization.advice import advice_for
from moe_heads.analysis.expert_utilization.flips import EpochChoices
from moe_heads.analysis.expert_utilization.health import RouterHealth
from moe_heads.analysis.expert_utilization.recorder import RouterKind, UtilizationRecorder
from moe_heads.analysis.expert_utilization.samples import group_by_sample
from moe_heads.routers import LinearRouter
from moe_heads.routing import Adapters, RoutingCollection, RoutingStats, adapted_routers, named_routers

__all__ = ["EpochReport", "TrainingRouters"]


@dataclass(frozen=True)
class EpochReport:
    """Report of one router over one epoch, for all ranks together.

    Attributes:
        stats: Its statistics.
        scalars: Numbers to log.
        warnings: New warnings about its experts.
        soft: Whether the router mixes all experts.
    """

    stats: RoutingStats
    scalars: dict[str, float]
    warnings: tuple[str, ...]
    soft: bool


class TrainingRouters:
    """Monitor of the routers of a model during training and validation.

    Args:
        model: The model.
        collection: Collection that `collect_routing` fills while the model runs.
        adapters: Adapters as passed to `collect_routing`.
        dead_below: Fraction of the fair share below which an expert is dead.
        starved_below: Fraction of the fair share below which it is starved.

    Attributes:
        validation_data_changed: Whether, on any rank, the last validation of the last finished epoch used different
            data than the validation before it.
        none_ran: Whether the last finished epoch had training batches but no router ran in any of them.
    """

    def __init__(
        self,
        model: nn.Module,
        collection: RoutingCollection,
        adapters: Adapters | None,
        dead_below: float,
        starved_below: float,
    ) -> None:
        self._collection, self.validation_data_changed, self.none_ran = collection, False, False
        # an adapter that fails must not end the training
        collection.keeps_errors = True
        self._reported: set[str] = set()
        self._num_batches = 0
        self._bounds = dead_below, starved_below
        self._health: dict[str, RouterHealth] = {}
        self._routers: dict[str, nn.Module] = {**named_routers(model)}
        self._foreign = {name: router for name, (router, _) in adapted_routers(model, adapters).items()}
        self._routers |= self._foreign
        self._recorder, self._validation_recorder = UtilizationRecorder(), UtilizationRecorder()
        self._in_evaluation: dict[str, RoutingStats] = {}
        self._choices = {name: EpochChoices() for name in self._routers}
        self._flips: dict[str, tuple[int, int]] = {}
        collection.paused = True
        # reported here by the name of the router, in place of a warning without it
        self._watches = {name: r.loss_watch for name, r in self._routers.items() if isinstance(r, LinearRouter)}
        for watch in self._watches.values():
            watch.restart()
        self._silenced = [watch for watch in self._watches.values() if watch.warns]
        for watch in self._silenced:
            watch.warns = False

    def close(self) -> None:
        """End the monitoring: routers whose balance loss was not reported here warn by themselves again."""
        for watch in self._silenced:
            watch.warns = True

    def begin_batch(self) -> None:
        """Start to collect the passes of a batch."""
        for passes in self._collection.routings.values():
            passes.clear()
        self._collection.paused = False

    def new_errors(self) -> dict[str, Exception]:
        """Return the errors of adapters since the last call, by the name of the router."""
        found = {name: error for name, error in self._collection.errors.items() if name not in self._reported}
        self._reported |= set(found)
        return found

    def end_training_batch(self) -> None:
        """Record the collected passes of a training batch."""
        self._collection.paused = True
        self._num_batches += 1
        self._recorder.record(self._collection)

    def end_validation_batch(self, batch: Batch) -> None:
        """Record the collected passes of a validation batch."""
        self._collection.paused = True
        for name, passes in self._collection.routings.items():
            if name in self._foreign:
                passes[:] = [group_by_sample(routing, batch) for routing in passes]
            self._choices[name].add(passes, batch)
        self._validation_recorder.record(self._collection)

    def end_validation(self) -> None:
        """Compare the choices with those of the previous validation, and sum the statistics of the routers."""
        self._flips = {name: choices.end_epoch() for name, choices in self._choices.items()}
        recorder = self._validation_recorder
        recorder.count()
        self._in_evaluation = {name: recorder.metric(name, kind).stats.cpu() for name, kind in recorder.kinds.items()}
        recorder.reset()

    def note_gradients(self, optimizer: Optimizer) -> None:
        """Record the gradients before a step of an optimizer."""
        self._recorder.record_gradients(self._routers, optimizer)

    def end_epoch(self, ranks: Ranks) -> dict[str, EpochReport]:
        """Report the epoch of each router that ran, and start the next one. Every rank must call it."""
        # a module may end its epoch in on_train_batch_start, and then the end of the batch is not called
        self._collection.paused = True
        self._recorder.count()
        of_this_rank = _RankEpoch(
            self._recorder.kinds,
            self._recorder.gradient_norms(),
            self._flips,
            self._in_evaluation,
            any(choices.data_changed for choices in self._choices.values()),
        )
        # a router that ran on one rank only is reported by all, since all ranks must reduce and log the same keys
        found = ranks.gather(of_this_rank)
        self.validation_data_changed = any(rank.data_changed for rank in found)
        expected = set(self._routers) - set(self._collection.errors)
        self.none_ran = bool(expected) and self._num_batches > 0 and not any(rank.kinds for rank in found)
        self._num_batches = 0
        kinds = {name: kind for rank in found for name, kind in rank.kinds.items()}
        reports: dict[str, EpochReport] = {}
        for name, kind in sorted(kinds.items()):
            metric = self._recorder.metric(name, kind)
            scalars = {key: float(value) for key, value in metric.compute().items()}
            stats = metric.stats.all_reduce().cpu()
            scalars |= _mean("router_gradient_norm", [rank.norms[name] for rank in found if name in rank.norms])
            scalars |= _mean("routing_flips", [rank.flips[name] for rank in found if name in rank.flips])
            if int(stats.num_rows) or int(stats.num_nonfinite):
                evaluated = [rank.in_evaluation[name] for rank in found if name in rank.in_evaluation]
                health = self._health_of(name, kind.soft)
                of_health = health.new_warnings(stats, reduce(add, evaluated) if evaluated else None)
                warnings = (*self._forgotten_loss(name), *of_health)
                reports[name] = EpochReport(stats, scalars | health.counts(stats), warnings, kind.soft)
        self._recorder.reset()
        self._flips, self._in_evaluation = {}, {}
        return reports

    def _forgotten_loss(self, name: str) -> Iterator[str]:
        """Yield a warning, once, if no balance loss of the router got a gradient so far."""
        watch = self._watches.get(name)
        if watch is not None and watch.is_unused:
            del self._watches[name]
            self._silenced = [other for other in self._silenced if other is not watch]
            yield watch.describe()

    def _health_of(self, name: str, soft: bool) -> RouterHealth:
        if name not in self._health:
            self._health[name] = RouterHealth(soft, advice_for(self._routers[name], soft), *self._bounds)
        return self._health[name]


@dataclass(frozen=True)
class _RankEpoch:
    """Epoch of one rank, by the name of the router. Norms and flips have their counts.

    The statistics in evaluation are those of the last validation.
    """

    kinds: dict[str, RouterKind]
    norms: dict[str, tuple[float, int]]
    flips: dict[str, tuple[int, int]]
    in_evaluation: dict[str, RoutingStats]
    data_changed: bool


def _mean(name: str, parts: Sequence[tuple[float, int]]) -> dict[str, float]:
    """Return the mean of all parts, each a sum and a count, or nothing if the total count is zero."""
    count = sum(number for _, number in parts)
    return {name: sum(total for total, _ in parts) / count} if count else {}

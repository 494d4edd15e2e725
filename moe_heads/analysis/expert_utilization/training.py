"""Routers of a model over its training: statistics, numbers to log, and warnings, by epoch or by window of steps."""

from collections.abc import Iterable, Iterator
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
from moe_heads.analysis.expert_utilization.inert import INERT_BELOW, InertWarnings
from moe_heads.analysis.expert_utilization.label_check import LabelCheck
from moe_heads.analysis.expert_utilization.labels import NoClasses
from moe_heads.analysis.expert_utilization.recorder import RouterKind, UtilizationRecorder
from moe_heads.analysis.expert_utilization.router_notes import RouterNotes
from moe_heads.analysis.expert_utilization.router_sums import RouterSums, add_over_ranks
from moe_heads.analysis.expert_utilization.samples import group_by_sample
from moe_heads.analysis.expert_utilization.token_masks import MaskFn, TokenMasks
from moe_heads.analysis.expert_utilization.weight_health import WeightHealth, weights_of_routers
from moe_heads.routers import LinearRouter
from moe_heads.routing import Adapters, RoutingCollection, RoutingStats, adapted_routers, named_routers

__all__ = ["RouterReport", "TrainingRouters"]


@dataclass(frozen=True)
class RouterReport:
    """Report of one router over one epoch or one window of training steps, for all ranks together.

    Attributes:
        stats: Its statistics.
        scalars: Numbers to log.
        warnings: New warnings about its experts; none for a window, since few choices leave experts unused by chance.
        notes: What is not known of its decisions.
        soft: Whether the router mixes all experts.
    """

    stats: RoutingStats
    scalars: dict[str, float]
    soft: bool
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class TrainingRouters:
    """Monitor of the routers of a model during training and validation.

    An epoch is the sum of its windows. Without a call of `end_window` it is one window.

    Args:
        model: The model.
        collection: Collection that `collect_routing` fills while the model runs.
        adapters: Adapters as passed to `collect_routing`.
        dead_below: Fraction of the fair share below which an expert is dead.
        starved_below: Fraction of the fair share below which it is starved.
        inert_below: Fraction of the median weight norm of the layer below which it is inert.
        mask_fn: Mask of the real tokens of a batch; see `TokenMasks`.

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
        inert_below: float = INERT_BELOW,
        mask_fn: MaskFn | None = None,
    ) -> None:
        self._collection, self.validation_data_changed, self.none_ran = collection, False, False
        # an adapter that fails must not end the training
        collection.keeps_errors = True
        self._masks = TokenMasks.of(model, mask_fn)
        self._num_batches = 0
        self._bounds = dead_below, starved_below
        self._model, self._inert = model, InertWarnings(inert_below)
        self._health: dict[str, RouterHealth] = {}
        self._epoch: dict[str, RouterSums] = {}
        self._routers: dict[str, nn.Module] = {**named_routers(model)}
        foreign = adapted_routers(model, adapters)
        self._foreign = {name: router for name, (router, _) in foreign.items()}
        of_adapters = {name: adapter for name, (_, adapter) in foreign.items()}
        self._notes = RouterNotes(of_adapters)
        self._routers |= self._foreign
        self._recorder, self._validation_recorder = UtilizationRecorder(), UtilizationRecorder()
        self._in_evaluation: dict[str, RoutingStats] = {}
        self._choices = {name: EpochChoices() for name in self._routers}
        self._flips: dict[str, tuple[int, int]] = {}
        self._flips_of_window: dict[str, tuple[int, int]] = {}
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

    def begin_batch(self, batch: Batch = None) -> None:
        """Start to collect the passes of a batch, None for one without a mask.

        Raises:
            ValueError: If the mask of the batch is wrong.
        """
        self._masks.begin(batch)
        self._collection.restart()

    def check_masks(self) -> None:
        """Check the masks against the passes of the batch so far.

        Raises:
            ValueError: If ``mask_fn`` was given, and the rows of a router are not the tokens of its mask.
        """
        self._masks.applied(self._collection.routings)

    def new_notes(self) -> list[str]:
        """Return what the last batches showed of routers that cannot be read, and of layers without a known router."""
        self._collection.errors |= self._recorder.errors | self._validation_recorder.errors
        return self._notes.after_pass(self._collection, self._masks)

    def check_labels(self, check: LabelCheck) -> NoClasses | None:
        """Return the reason why the labels do not belong to the rows of the batch so far, or None."""
        return check.after(self._collection.routings, self._foreign)

    def end_training_batch(self, batch: Batch = None) -> None:
        """Record the collected passes of a training batch, which is given if it was not known when it began.

        Raises:
            ValueError: If the mask of the batch is wrong.
        """
        self._collection.paused = True
        if batch is not None:
            self._masks.begin(batch)
        self._num_batches += 1
        self._mask_passes()
        self._recorder.record(self._collection)

    def end_validation_batch(self, batch: Batch) -> None:
        """Record the collected passes of a validation batch."""
        self._collection.paused = True
        self._mask_passes()
        for name, passes in self._collection.routings.items():
            if name in self._foreign:
                passes[:] = [group_by_sample(routing, batch) for routing in passes]
            self._choices[name].add(passes, batch)
        self._validation_recorder.record(self._collection)

    def _mask_passes(self) -> None:
        for name, masked in self._masks.applied(self._collection.routings).items():
            self._collection.routings[name][:] = masked

    def end_validation(self) -> None:
        """Compare the choices with those of the previous validation, and sum the statistics of the routers."""
        self._flips = {name: choices.end_epoch() for name, choices in self._choices.items()}
        self._flips_of_window = self._flips
        recorder = self._validation_recorder
        recorder.count()
        self._in_evaluation = {name: recorder.metric(name, kind).stats.cpu() for name, kind in recorder.kinds.items()}
        recorder.reset()

    def note_gradients(self, optimizer: Optimizer) -> None:
        """Record the gradients before a step of an optimizer."""
        self._recorder.record_gradients(self._routers, optimizer)

    def end_window(self, ranks: Ranks) -> dict[str, RouterReport]:
        """Report the steps since the last window of each router that ran, and start a window. Every rank must call it.

        The numbers are those of an epoch. ``routing_flips`` is that of the last validation since the last window.
        """
        if not self._routers:
            return {}
        window = self._close_window(ranks)
        self._flips_of_window = {}
        reports: dict[str, RouterReport] = {}
        for name, sums in window.sums.items():
            if not sums.is_empty:
                soft = window.kinds[name].soft
                counts = self._health_of(name, soft).counts(sums.stats)
                reports[name] = RouterReport(sums.stats, sums.scalars() | _flips_of(name, window.flips) | counts, soft)
        return reports

    def end_epoch(self, ranks: Ranks) -> dict[str, RouterReport]:
        """Report the epoch of each router that ran, and start the next one. Every rank must call it."""
        kinds = self._close_window(ranks).kinds
        data_changed = any(choices.data_changed for choices in self._choices.values())
        weights = weights_of_routers(self._model, {n: (self._routers[n], k.num_experts) for n, k in kinds.items()})
        found = ranks.gather(_RankEpoch(self._flips, self._in_evaluation, data_changed, weights))
        self.validation_data_changed = any(rank.data_changed for rank in found)
        # a module that only may be a router is not expected to be one
        expected = set(self._collection.routings) - set(self._collection.errors)
        self.none_ran = bool(expected) and self._num_batches > 0 and not kinds
        flips = _added([rank.flips for rank in found])
        reports: dict[str, RouterReport] = {}
        for name, sums in self._epoch.items():
            if name in kinds and not sums.is_empty:
                evaluated = [rank.in_evaluation[name] for rank in found if name in rank.in_evaluation]
                health = self._health_of(name, kinds[name].soft)
                of_health = health.new_warnings(sums.stats, reduce(add, evaluated) if evaluated else None)
                scalars = sums.scalars() | _flips_of(name, flips) | health.counts(sums.stats)
                of_weights: list[str] = []
                known = next((rank.weights[name] for rank in found if name in rank.weights), None)
                if known is not None and int(sums.stats.num_rows):
                    of_weights = self._inert.add(scalars, name, known, health.dead(sums.stats))
                warnings = (*self._forgotten_loss(name), *of_health, *of_weights)
                notes = tuple(self._notes.after_count(name, sums.stats))
                reports[name] = RouterReport(sums.stats, scalars, kinds[name].soft, warnings, notes)
        self._num_batches, self._epoch, self._flips, self._in_evaluation = 0, {}, {}, {}
        return reports

    def _close_window(self, ranks: Ranks) -> "_Window":
        """Add the window to the epoch, and start a new one."""
        # a module may end its epoch in on_train_batch_start, and then the end of the batch is not called
        self._collection.paused = True
        self._recorder.count()
        # a router that ran on one rank only is reported by all, since all ranks must reduce and log the same keys
        found = ranks.gather((self._recorder.kinds, self._flips_of_window, set(self._collection.only_here)))
        kinds = {name: kind for of_rank, _, _ in found for name, kind in of_rank.items()}
        only_here = {name for _, _, names in found for name in names}
        here = {name: self._recorder.sums(name, kinds[name]) for name in sorted(kinds)}
        window = add_over_ranks({name: sums for name, sums in here.items() if name not in only_here}, ranks)
        # the numbers of rank zero, so that all ranks log the same
        window |= ranks.gather({name: here[name].cpu() for name in sorted(only_here & set(here))})[0]
        self._recorder.reset()
        for name, sums in window.items():
            self._epoch[name] = self._epoch[name] + sums if name in self._epoch else sums
        return _Window(kinds, window, _added([flips for _, flips, _ in found]))

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
class _Window:
    """Window of all ranks, by the name of each router that ever ran on any of them. Flips have their counts."""

    kinds: dict[str, RouterKind]
    sums: dict[str, RouterSums]
    flips: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class _RankEpoch:
    """Last validation of one rank in an epoch, by the name of the router. Flips have their counts.

    Weights are those at the end of the epoch. They are absent where the experts of a router are not known.
    """

    flips: dict[str, tuple[int, int]]
    in_evaluation: dict[str, RoutingStats]
    data_changed: bool
    weights: dict[str, WeightHealth]


def _added(flips: Iterable[dict[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    """Add the flips of the ranks and their counts."""
    total: dict[str, tuple[int, int]] = {}
    for of_rank in flips:
        for name, (flipped, compared) in of_rank.items():
            before = total.get(name, (0, 0))
            total[name] = before[0] + flipped, before[1] + compared
    return total


def _flips_of(name: str, flips: dict[str, tuple[int, int]]) -> dict[str, float]:
    flipped, compared = flips.get(name, (0, 0))
    return {"routing_flips": flipped / compared} if compared else {}

"""The routers of a model over its training epochs: what is drawn, kept and told of each."""

from dataclasses import dataclass

from torch import nn

from moe_heads.callbacks.functional.common.batches import Batch, labels_of
from moe_heads.callbacks.functional.common.ranks import Ranks
from moe_heads.callbacks.functional.utilization.flips import EpochChoices
from moe_heads.callbacks.functional.utilization.health import RouterHealth
from moe_heads.callbacks.functional.utilization.watch import RoutingWatch
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
    """

    def __init__(
        self,
        model: nn.Module,
        collection: RoutingCollection,
        adapters: Adapters | None,
        dead_below: float,
        starved_below: float,
    ) -> None:
        self._collection = collection
        self._bounds = dead_below, starved_below
        self._health: dict[str, RouterHealth] = {}
        self._routers: dict[str, nn.Module] = {**named_routers(model)}
        self._routers |= {name: router for name, (router, _) in adapted_routers(model, adapters).items()}
        self._watch = RoutingWatch()
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
        self._watch.take(self._collection)

    def end_validation_batch(self, batch: Batch) -> None:
        """Take what was heard of a validation batch."""
        self._collection.paused = True
        for name, passes in self._collection.routings.items():
            self._choices[name].add(passes, labels_of(batch))
            passes.clear()

    def end_validation(self) -> None:
        """Compare the choices with those of the validation before."""
        self._flips = {name: choices.end_epoch() for name, choices in self._choices.items()}

    def note_gradients(self) -> None:
        """Note the gradients that an optimizer is about to follow."""
        self._watch.note_gradients(self._routers)

    def end_epoch(self, ranks: Ranks) -> dict[str, EpochReport]:
        """What the epoch showed of each router that ran; then the next one begins. Every rank has to call it."""
        # a module may end its epoch in on_train_batch_start: the batch then has no end
        self._collection.paused = True
        self._watch.count()
        norms = self._watch.gradient_norms()
        reports: dict[str, EpochReport] = {}
        # a router may not have run on each rank; all of them have to add up the same ones
        kinds = {name: kind for found in ranks.gather(self._watch.kinds) for name, kind in found.items()}
        for name, kind in sorted(kinds.items()):
            metric = self._watch.metric(name, kind)
            scalars = {key: float(value) for key, value in metric.compute().items()}
            stats = metric.stats.all_reduce().cpu()
            if name in norms:
                scalars["router_gradient_norm"] = norms[name]
            flipped, compared = (ranks.sum(number) for number in self._flips.get(name, (0, 0)))
            if compared:
                scalars["routing_flips"] = flipped / compared
            if int(stats.num_rows):
                health = self._health.setdefault(name, RouterHealth(kind.soft, *self._bounds))
                reports[name] = EpochReport(stats, scalars, tuple(health.news(stats)))
        self._watch.reset()
        self._flips = {}
        return reports

    @property
    def has_reordered_validation(self) -> bool:
        """Whether the validation data came in another order than the time before."""
        return any(choices.reordered for choices in self._choices.values())

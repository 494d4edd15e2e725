"""Callback: who does what among the experts, over training and at the end of fit."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import Unpack, override

from moe_heads.callbacks.evaluation import check_forward
from moe_heads.callbacks.fit_end import FitEndAnalysis
from moe_heads.callbacks.functional import ExpertUtilizationResult, expert_utilization
from moe_heads.callbacks.functional.common.batches import ForwardFn, call_model
from moe_heads.callbacks.functional.utilization.history import plot_load_history
from moe_heads.callbacks.inputs import AnalysisInputs
from moe_heads.callbacks.options import AnalysisOptions, OverRanks
from moe_heads.callbacks.reporting import Report
from moe_heads.callbacks.trainer_access import Split, datamodule_of
from moe_heads.routing import Router, RoutingCollection, RoutingStats, collect_routing

__all__ = ["ExpertUtilizationCallback"]


class ExpertUtilizationCallback(FitEndAnalysis):
    """Load and importance of every expert by epoch, and by class at the end of fit.

    Works for any module with heads of `moe_heads` inside; a module without one is left alone. While training, one point
    an epoch below ``expert_utilization/epoch/<head>/``, over the training batches as they were routed, noise included:

    ==========================  =======================================================================
    load_<e>                    share of the choices that went to expert e; sums to 1
    importance_<e>              share of the mixing weight that went to expert e; sums to 1
    entropy                     mean entropy of a row's full softmax, nats
    ==========================  =======================================================================

    At the end of fit, below ``expert_utilization/<split>/``: the numbers of `functional.ExpertUtilizationResult` for
    each head; to TensorBoard also the class-by-expert map and the load over the epochs as figures, and a table.

    Args:
        class_names: Names of the classes; by default those of the data module, else numbers.
        forward_fn: ``forward_fn(pl_module, batch)``; by default the module is called with a batch's first entry.
        options: What all analyses share, without a loss; see `AnalysisOptions`. 10,000 samples by default: the class
            map needs some of each class for each expert.

    Attributes:
        history: Statistics of each finished training epoch by name of the head.

    Example:
        >>> from moe_heads.callbacks import ExpertUtilizationCallback
        >>> ExpertUtilizationCallback(num_samples=5000).splits
        ('train', 'test')
    """

    name = "expert_utilization"
    needs_loss: ClassVar[bool] = False
    over_ranks: OverRanks = "share"
    default_num_samples: ClassVar[int] = 10_000
    results: dict[Split, ExpertUtilizationResult]

    def __init__(
        self,
        class_names: Sequence[str] | None = None,
        forward_fn: ForwardFn | None = None,
        **options: Unpack[AnalysisOptions],
    ) -> None:
        super().__init__(**options)
        if class_names is not None and not isinstance(class_names, (list, tuple)):
            raise ValueError(f"class_names: expected a list of names; got {class_names!r}")
        self.class_names, self.forward_fn = class_names, forward_fn
        self.history: dict[str, list[RoutingStats]] = {}
        self._epoch: dict[str, RoutingStats] = {}
        self._hooks = ExitStack()
        self._batch = RoutingCollection()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if any(isinstance(module, Router) for module in pl_module.modules()):
            check_forward(self, pl_module, self.forward_fn)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.history, self._epoch = {}, {}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._forget_batch()
        self._batch = self._hooks.enter_context(collect_routing(pl_module))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, stats in self._batch.stats.items():
            self._epoch[name] = self._epoch[name] + stats if name in self._epoch else stats
        self._forget_batch()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._forget_batch()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a module may end its epoch in on_train_batch_start: the batch then has no end
        self._forget_batch()
        for name, stats in self._epoch.items():
            total = stats.all_reduce()
            self.history.setdefault(name, []).append(total)
            shares = {"load": total.load.tolist(), "importance": total.importance.tolist()}
            metrics = {f"{kind}_{e}": share for kind, values in shares.items() for e, share in enumerate(values)}
            metrics["entropy"] = total.entropy.item()
            named = {f"{self.name}/epoch/{name}/{key}": value for key, value in metrics.items()}
            # equal on every rank already; without sync_dist Lightning warns
            pl_module.log_dict(named, sync_dist=True)
        self._epoch = {}
        super().on_train_epoch_end(trainer, pl_module)

    @override
    def compute(self, inputs: AnalysisInputs) -> ExpertUtilizationResult:
        datamodule = None if inputs.trainer is None else datamodule_of(inputs.trainer)
        return expert_utilization(
            inputs.model,
            inputs.batches,
            class_names=self.class_names or getattr(datamodule, "class_names", None),
            forward_fn=self.forward_fn or call_model,
            seed=self.seed,
            monitor=inputs.monitor,
            ranks=inputs.ranks,
        )

    @override
    def report(self, result: ExpertUtilizationResult) -> Report:
        experts = {f"{head}/experts": result.plot(head=head)[0] for head in result.load}
        epochs = {f"{head}/load_over_epochs": plot_load_history(stats)[0] for head, stats in self.history.items()}
        figures = {**experts, **epochs}
        return Report(result.metrics(), {"summary": result.summary()}, figures)

    def _forget_batch(self) -> None:
        self._hooks.close()
        self._batch = RoutingCollection()

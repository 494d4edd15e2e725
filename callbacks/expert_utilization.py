"""Callback for expert utilization during training and at the end of fit."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import Unpack, override

from moe_heads.analysis import ExpertUtilizationResult, expert_utilization
from moe_heads.analysis._shared.batches import Batch, ForwardFn, call_model, labels_of
from moe_heads.analysis._shared.names import are_names, check_names
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.expert_utilization.examples import images_of
from moe_heads.analysis.expert_utilization.function import checked_options
from moe_heads.analysis.expert_utilization.head_utilization import Detail
from moe_heads.analysis.expert_utilization.training import TrainingRouters
from moe_heads.callbacks._shared.evaluation import check_forward
from moe_heads.callbacks._shared.inputs import AnalysisInputs
from moe_heads.callbacks._shared.options import AnalysisOptions, OverRanks
from moe_heads.callbacks._shared.reporting import Report
from moe_heads.callbacks._shared.trainer_access import Split, datamodule_of, process_group_of
from moe_heads.callbacks._utilization_log import UtilizationLog
from moe_heads.callbacks.base import FitEndAnalysis
from moe_heads.checks import check_callables, check_flags, check_option
from moe_heads.routing import Adapters, RoutingStats, collect_routing, named_routers

__all__ = ["ExpertUtilizationCallback"]


class ExpertUtilizationCallback(FitEndAnalysis):
    """Load, importance and classes of every expert, after each training epoch and in full at the end of fit.

    Works for any module that contains heads of this package and, with ``adapters``, for other routers. A module without
    a router is ignored. During training, one point is logged for each epoch below ``expert_utilization/epoch/<head>/``.
    It covers the training batches as they were routed, including noise: the numbers of
    `moe_heads.analysis.ExpertUtilizationMetric`, and

    ======================  ===========================================================================
    num_dead_experts        experts below ``dead_below``, and likewise num_starved_experts
    router_gradient_norm    norm of the router's gradient, mean over every twentieth optimizer step
    routing_flips           fraction of validation samples with different experts than one validation before
    ======================  ===========================================================================

    Dead experts, starved experts and collapsed routing each trigger one warning with advice at the end of the epoch in
    which they appear. Findings that appear only in validation batches, where routing has no noise, trigger a warning
    after two validations.

    At the end of fit, the numbers of `moe_heads.analysis.ExpertUtilizationResult` are logged for each head below
    ``expert_utilization/<split>/``. TensorBoard also receives two tables and figures of load and classes, of
    co-activation, and of examples for each expert, the load over the epochs, and a page of charts (Custom Scalars).

    For a model with several routers, a summary over the layers replaces the numbers of each layer, unless
    ``detail="full"``. Its size does not depend on the number of layers. The keys are
    ``expert_utilization/<place>/<measure>/<level>`` with the place "epoch" or a split, and

    ==============================  ===================================================================
    worst, median, best             of load_cv, max_violation, relative_effective_experts (effective / E)
    lowest, median, highest         of relative_entropy (entropy / log E)
    median, highest                 of routing_flips (epoch only)
    median                          of mutual_information (splits only)
    worst                           of dropped and nonfinite (the latter in epochs only)
    p10, p50, p90                   of relative_load, over the experts of all layers (epoch only)
    ==============================  ===================================================================

    and num_dead_experts, num_starved_experts and num_layers_with_dead_experts, directly below the place. A map of the
    load by layer and expert follows each epoch, and a map of the dead experts by layer and epoch ends the training. The
    summary in the text tab names the layers with the worst balance. Two of them have figures and tables of their own.

    A training step only stores references to the router's outputs. They are counted at the end of the epoch, or earlier
    in large pieces. The callback causes no graph break in torch.compile.

    Args:
        class_names: Names of the classes; by default those of the data module, else numbers.
        forward_fn: ``forward_fn(pl_module, batch)``; by default the module is called with a batch's first entry.
        label_fn: ``label_fn(batch) -> labels (B,)``, -100 for a sample without a class, or None; by default the second
            entry of a batch, or "labels".
        image_fn: ``image_fn(batch) -> images (B, C, H, W)`` or None; by default the first entry, if it has this shape.
        adapters: Adapters for routers of other packages; see `moe_heads.collect_routing`.
        dead_below: Fraction of the fair share 1/E of the load (of the weight, for a soft router) below which an expert
            is dead.
        starved_below: Fraction below which an expert is starved. The default is a quarter, since a balanced head stays
            well above it.
        num_examples: Number of images for each expert, of the samples with the highest gate; 0 for none. Ignored if
            batches hold no images.
        num_permutations: Permutations of the labels for the chance level of the mutual information.
        ablation: Whether to evaluate also the accuracy without each expert.
        warn: Whether to warn during training.
        detail: "summary" for a bounded number of keys, figures and tables, "full" for all of every head. Of a single
            head, the summary lacks numbers that others imply, such as the importance of each expert. It is the default
            because 48 layers have thousands of numbers. All are in ``results`` and ``history`` in both cases.
        options: Options of all analyses, without a loss; see `AnalysisOptions`. The default of 10,000 samples gives the
            class map several samples of each class for each expert.

    Attributes:
        history: Statistics of each finished training epoch, by name of the head and number of the epoch. It is saved in
            checkpoints. A checkpoint written before the end of an epoch, as after a validation, lacks that epoch.

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
        label_fn: Callable[[Batch], Tensor | None] | None = None,
        image_fn: Callable[[Batch], Tensor | None] | None = None,
        adapters: Adapters | None = None,
        dead_below: float = 0.01,
        starved_below: float = 0.25,
        num_examples: int = 8,
        num_permutations: int = 200,
        ablation: bool = False,
        warn: bool = True,
        detail: Detail = "summary",
        **options: Unpack[AnalysisOptions],
    ) -> None:
        super().__init__(**options)
        check_names(class_names=class_names)
        checked_options(dead_below, starved_below, num_permutations, num_examples, self.seed)
        check_callables(forward_fn=forward_fn, label_fn=label_fn, image_fn=image_fn)
        check_flags(ablation=ablation, warn=warn)
        check_option("detail", detail, ("summary", "full"))
        self.class_names = None if class_names is None else tuple(class_names)
        self.forward_fn, self.adapters = forward_fn, adapters
        self.label_fn, self.image_fn = label_fn, image_fn
        self.dead_below, self.starved_below, self.warn = dead_below, starved_below, warn
        self.num_examples, self.num_permutations, self.ablation = num_examples, num_permutations, ablation
        self.detail: Detail = detail
        self.history: dict[str, dict[int, RoutingStats]] = {}
        self._log = UtilizationLog(self.name, detail, dead_below, starved_below)
        self._warned_of_order, self._warned_of_silence = False, False
        self._listening = ExitStack()
        self._routers: TrainingRouters | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.current_epoch == 0:
            # a new fit: neither a Trainer that continues nor a loaded checkpoint
            self.history = {}
        # modules named by adapters may not exist yet; they are checked when the fit starts
        if named_routers(pl_module) or self.adapters:
            check_forward(self, pl_module, self.forward_fn)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._warned_of_order, self._warned_of_silence = False, False
        self._close()
        self._log = UtilizationLog(self.name, self.detail, self.dead_below, self.starved_below)
        # once for the whole fit: a change of hooks would trigger a recompilation of a compiled model
        collection = self._listening.enter_context(collect_routing(pl_module, self.adapters))
        self._routers = TrainingRouters(pl_module, collection, self.adapters, self.dead_below, self.starved_below)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._routers is not None:
            self._routers.begin_batch()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._routers is not None:
            self._routers.note_gradients(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._routers is not None:
            self._routers.end_training_batch()
            self._report_errors(self._routers)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._routers is not None and not trainer.sanity_checking:
            self._routers.begin_batch()

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._routers is not None and not trainer.sanity_checking:
            self._routers.end_validation_batch(batch)
            self._report_errors(self._routers)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._routers is not None and not trainer.sanity_checking:
            self._routers.end_validation()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._routers is not None:
            self._end_epoch(trainer, pl_module, self._routers)
        super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log.draw_history(trainer, self.history)
        self._close()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()
        super().teardown(trainer, pl_module, stage)

    @override
    def kept_in_checkpoints(self) -> dict[str, Any]:
        return {head: {epoch: vars(stats) for epoch, stats in epochs.items()} for head, epochs in self.history.items()}

    @override
    def restore(self, kept: dict[str, Any]) -> None:
        self.history = {
            head: {epoch: RoutingStats(**stats) for epoch, stats in epochs.items()} for head, epochs in kept.items()
        }

    @override
    def compute(self, inputs: AnalysisInputs) -> ExpertUtilizationResult:
        datamodule = None if inputs.trainer is None else datamodule_of(inputs.trainer)
        return expert_utilization(
            inputs.model,
            inputs.batches,
            class_names=self.class_names or _class_names_of(datamodule),
            forward_fn=self.forward_fn or call_model,
            label_fn=self.label_fn or labels_of,
            image_fn=self.image_fn or images_of,
            adapters=self.adapters,
            dead_below=self.dead_below,
            starved_below=self.starved_below,
            num_permutations=self.num_permutations,
            num_examples=self.num_examples,
            ablation=self.ablation,
            seed=self.seed,
            progress=inputs.progress,
            ranks=inputs.ranks,
        )

    @override
    def report(self, result: ExpertUtilizationResult) -> Report:
        if not result.heads:
            return Report(result.metrics(self.detail))
        return Report(result.metrics(self.detail), result.texts(self.detail), result.figures(self.detail))

    def _end_epoch(self, trainer: Trainer, pl_module: LightningModule, routers: TrainingRouters) -> None:
        reports = routers.end_epoch(Ranks(process_group_of(trainer), f"{self.name}/epoch"))
        if routers.validation_data_changed and not self._warned_of_order:
            self._warned_of_order = True
            rank_zero_warn(
                f"{self.name}: validation batches differ between epochs, so routing flips cannot be computed. Give the"
                " validation loader shuffle=False and no random transform."
            )
        if routers.none_ran and not self._warned_of_silence:
            self._warned_of_silence = True
            rank_zero_warn(
                f"{self.name}: no router ran in epoch {trainer.current_epoch}, so there are no numbers for it. A model"
                " that was compiled and run before this fit does not call forward hooks. Attach the callback to its"
                " first fit, or compile it again after torch._dynamo.reset()."
            )
        for head, report in reports.items():
            if int(report.stats.num_rows):
                self.history.setdefault(head, {})[trainer.current_epoch] = report.stats
        numbers = self._log.numbers(reports, self.history)
        # already equal on every rank, but Lightning warns without sync_dist
        pl_module.log_dict({f"{self.name}/epoch/{key}": value for key, value in numbers.items()}, sync_dist=True)
        self._log.draw_epoch(trainer)
        for warning in self._log.warnings(reports) if self.warn else ():
            rank_zero_warn(f"{self.name}: epoch {trainer.current_epoch}, {warning}")

    def _report_errors(self, routers: TrainingRouters) -> None:
        for name, error in routers.new_errors().items():
            rank_zero_warn(
                f"{self.name}: the adapter of router {name!r} failed and is not called any more in this fit:"
                f" {type(error).__name__}: {error}"
            )

    def _close(self) -> None:
        self._listening.close()
        if self._routers is not None:
            self._routers.close()
        self._routers = None


def _class_names_of(datamodule: object) -> Sequence[str] | None:
    """Return the class names of a data module if it has them as a list of names, else None."""
    names = getattr(datamodule, "class_names", None)
    return names if are_names(names) else None

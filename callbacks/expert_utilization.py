"""Callback for expert utilization during training and at the end of fit."""

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack, override

from moe_heads.analysis import ExpertUtilizationResult, expert_utilization
from moe_heads.analysis._shared.batches import Batch, ForwardFn, call_model
from moe_heads.analysis._shared.names import check_names
from moe_heads.analysis.expert_utilization.classes import checked_ignore_index
from moe_heads.analysis.expert_utilization.examples import images_of
from moe_heads.analysis.expert_utilization.function import checked_options
from moe_heads.analysis.expert_utilization.head_utilization import Detail
from moe_heads.analysis.expert_utilization.inert import INERT_BELOW
from moe_heads.analysis.expert_utilization.label_entry import labels_of
from moe_heads.analysis.expert_utilization.labels import LabelFn, NoClasses
from moe_heads.analysis.expert_utilization.router_notes import UnknownRouterWarning
from moe_heads.analysis.expert_utilization.token_masks import MaskFn
from moe_heads.callbacks._shared.evaluation import check_forward
from moe_heads.callbacks._shared.execution_context import ExecutionContext
from moe_heads.callbacks._shared.inputs import AnalysisInputs
from moe_heads.callbacks._shared.options import AnalysisOptions, OverRanks
from moe_heads.callbacks._shared.reporting import Report
from moe_heads.callbacks._shared.trainer_access import Split
from moe_heads.callbacks._utilization_points import packed_history, unpacked_history
from moe_heads.callbacks._utilization_training import TrainingUtilization, class_names_of
from moe_heads.callbacks._utilization_warnings import UtilizationWarnings
from moe_heads.callbacks.base import FitEndAnalysis
from moe_heads.checks import check_callables, check_flags, check_option
from moe_heads.routing import Adapters, RoutingStats, named_routers

__all__ = ["ExpertUtilizationCallback"]


class ExpertUtilizationCallback(FitEndAnalysis):
    """Load, importance and classes of every expert, after each training epoch and in full at the end of fit.

    Works for any module that contains heads of this package or routers that are recognized, such as those of
    transformers, and with ``adapters`` for all others. A layer of experts without a known router triggers a
    warning. During training, one point is logged for each epoch below ``expert_utilization/epoch/<head>/``, and
    with ``every_n_train_steps`` one for each window of n optimizer steps below ``expert_utilization/step/<head>/``.
    It covers the training batches as they were routed, including noise: the numbers of
    `moe_heads.analysis.ExpertUtilizationMetric`, and

    ======================  ===========================================================================
    num_dead_experts        experts below ``dead_below``, and likewise num_starved_experts
    router_gradient_norm    norm of the router's gradient, mean over every twentieth optimizer step from the first on
    routing_flips           fraction of validation samples with different experts than one validation before
    num_inert_experts       experts below ``inert_below`` of the median weight norm that are not dead
    weight_norm_min         smallest norm of the weights of an expert, in units of the median of the layer
    stable_rank_min         the same for the stable rank of the weights
    ======================  ===========================================================================

    Dead, starved and inert experts and collapsed routing each trigger one warning with advice at the end of the epoch
    in which they appear. Findings that appear only in validation batches, where routing has no noise, trigger a warning
    after two validations.

    A window covers the steps since the previous point, or since the fit was resumed. It ends with its epoch at the
    latest, so the windows of an epoch add up to it. ``routing_flips`` is in the first point after a validation.

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
    worst                           of dropped, dropped_choices and nonfinite (the latter in epochs only)
    p10, p50, p90                   of relative_load, over the experts of all layers (epoch only)
    ==============================  ===================================================================

    and num_dead_experts, num_starved_experts, num_inert_experts and num_layers_with_dead_experts, below the place. A
    map of the load by layer and expert follows each epoch, and a map of the dead experts by layer and epoch ends the
    training. The summary in the text tab names the layers with the worst balance. Two of them have figures and tables
    of their own.

    A training step only stores references to the router's outputs. They are counted at the end of the epoch, or earlier
    in large pieces. The callback causes no graph break in torch.compile.

    Args:
        class_names: Names of the classes; by default those of the data module, else numbers.
        forward_fn: ``forward_fn(pl_module, batch)``; by default the module is called with a batch's first entry.
        label_fn: ``label_fn(batch) -> labels``, integers (B,), (B, T) for tokens, or (R,) for routed rows, or None; by
            default the second entry of a pair, or the entry "labels", "label", "y", "target" or "targets". If labels
            cannot be used as classes, one warning states the reason, before training if the first batch shows it. The
            other quantities are reported.
        ignore_index: Labels without a class, in addition to negative ones; see
            `moe_heads.analysis.expert_utilization`.
        image_fn: ``image_fn(batch) -> images (B, C, H, W)`` or None; by default the first entry, if it has this shape.
        adapters: Adapters for routers that are not recognized, or that shall be read in another way; see
            `moe_heads.collect_routing`.
        mask_fn: ``mask_fn(batch) -> mask (B, T)``, bool, True for real tokens, or None. Padding then counts in no
            number. By default the entry "attention_mask" of a batch, if it is a tensor of two dimensions.
        dead_below: Fraction of the fair share 1/E of the load (of the weight, for a soft router) below which an expert
            is dead.
        starved_below: Fraction below which an expert is starved. The default is a quarter, since a balanced head stays
            well above it.
        inert_below: Fraction of the median norm of the layer below which an expert is inert: of the weights while
            training, and of the output at the end of fit. See `moe_heads.analysis.expert_utilization`.
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
        history_steps: Statistics of each window, by name of the head and ``trainer.global_step`` at its end, likewise
            saved. From more than 256 windows, neighbors are added in pairs, so that the memory stays bounded.

    Example:
        >>> from moe_heads.callbacks import ExpertUtilizationCallback
        >>> ExpertUtilizationCallback(num_samples=5000).splits
        ('train', 'test')
    """

    name = "expert_utilization"
    needs_loss: ClassVar[bool] = False
    analyzes_steps: ClassVar[bool] = False
    records_batches: ClassVar[bool] = True
    times_points: ClassVar[bool] = False
    over_ranks: OverRanks = "share"
    default_num_samples: ClassVar[int] = 10_000
    results: dict[Split, ExpertUtilizationResult]

    def __init__(
        self,
        class_names: Sequence[str] | None = None,
        forward_fn: ForwardFn | None = None,
        label_fn: LabelFn | None = None,
        ignore_index: int | Collection[int] | None = None,
        image_fn: Callable[[Batch], Tensor | None] | None = None,
        adapters: Adapters | None = None,
        mask_fn: MaskFn | None = None,
        dead_below: float = 0.01,
        starved_below: float = 0.25,
        inert_below: float = INERT_BELOW,
        num_examples: int = 8,
        num_permutations: int = 200,
        ablation: bool = False,
        warn: bool = True,
        detail: Detail = "summary",
        **options: Unpack[AnalysisOptions],
    ) -> None:
        super().__init__(**options)
        check_names(class_names=class_names)
        checked_options(dead_below, starved_below, num_permutations, num_examples, self.seed, inert_below)
        check_callables(forward_fn=forward_fn, label_fn=label_fn, image_fn=image_fn, mask_fn=mask_fn)
        check_flags(ablation=ablation, warn=warn)
        check_option("detail", detail, ("summary", "full"))
        self.class_names = None if class_names is None else tuple(class_names)
        self.forward_fn, self.adapters, self.mask_fn = forward_fn, adapters, mask_fn
        self.label_fn, self.image_fn = label_fn, image_fn
        self.ignore_index = checked_ignore_index(ignore_index)
        self.dead_below, self.starved_below, self.warn = dead_below, starved_below, warn
        self.inert_below = inert_below
        self.num_examples, self.num_permutations, self.ablation = num_examples, num_permutations, ablation
        self.detail: Detail = detail
        self.history: dict[str, dict[int, RoutingStats]] = {}
        self.history_steps: dict[str, dict[int, RoutingStats]] = {}
        self._warnings = UtilizationWarnings(self.name, label_fn is not None)
        self._training: TrainingUtilization | None = None

    @override
    def check_early(self, model: nn.Module) -> None:
        # modules named by adapters may not exist yet; they are checked when the fit starts
        if named_routers(model) or self.adapters:
            check_forward(type(self).__name__, model, self.forward_fn)

    @override
    def forget(self) -> None:
        super().forget()
        self.history, self.history_steps = {}, {}

    @override
    def begin_fit(self, context: ExecutionContext, model: nn.Module) -> None:
        super().begin_fit(context, model)
        self._end_listening()
        self._warnings = UtilizationWarnings(self.name, self.label_fn is not None)
        if self.is_left_out:
            return
        self._training = TrainingUtilization(
            context,
            model,
            self,
            self.history,
            self.history_steps,
            self._warnings,
            checks_labels=self.runs_in_fit and "train" in self.splits and context.shows_labels,
        )

    @override
    def begin_batch(self, context: ExecutionContext, batch: Batch) -> None:
        if self._training is not None:
            self._training.begin_batch(batch)

    @override
    def before_backward(self) -> None:
        if self._training is not None:
            self._training.check_masks()

    @override
    def before_step(self, context: ExecutionContext, optimizer: Optimizer) -> None:
        if self._training is not None:
            self._training.note_gradients(optimizer)

    @override
    def end_batch(self, context: ExecutionContext, model: nn.Module, batch: Batch) -> None:
        # a loop that announces no batch shows it only now
        self.finish_batch(None if context.announces_validation else batch)
        super().end_batch(context, model, batch)

    @override
    def finish_batch(self, batch: Batch = None) -> None:
        if self._training is not None:
            self._training.finish_batch(batch)

    @override
    def track_step(self, context: ExecutionContext, model: nn.Module) -> None:
        if self._training is not None:
            self._training.end_window(context)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._training is not None and not trainer.sanity_checking:
            self._training.begin_validation_batch(batch)

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
        if self._training is not None and not trainer.sanity_checking:
            self._training.end_validation_batch(batch)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training is not None and not trainer.sanity_checking:
            self._training.end_validation()

    @override
    def end_epoch(self, context: ExecutionContext, model: nn.Module) -> None:
        if self._training is not None:
            if self._interval is not None:  # the rest of the epoch
                self._training.end_window(context, is_logged=context.step != self._interval.last)
                self._interval.start(context.step)
            self._training.end_epoch(context)
        super().end_epoch(context, model)

    @override
    def end_training(self, context: ExecutionContext) -> None:
        if self._training is not None:
            self._training.draw_history(context)
        self._end_listening()

    @override
    def close(self) -> None:
        self._end_listening()
        super().close()

    def _end_listening(self) -> None:
        if self._training is not None:
            self._training.close()
        self._training = None

    @override
    def kept_in_checkpoints(self) -> dict[str, Any]:
        return super().kept_in_checkpoints() | packed_history(self.history, self.history_steps)

    @override
    def restore(self, kept: dict[str, Any]) -> None:
        super().restore(kept)
        own = {key: value for key, value in kept.items() if key not in {"tracked", "tracked_steps"}}
        self.history, self.history_steps = unpacked_history(own)

    @override
    def compute(self, inputs: AnalysisInputs) -> ExpertUtilizationResult:
        with warnings.catch_warnings():
            # given below, those that the training has not given
            warnings.simplefilter("ignore", UnknownRouterWarning)
            result = self._measured(inputs)
        self._warnings.notes(result.notes)
        self._warnings.no_classes(NoClasses(result.no_classes, result.has_odd_labels) if result.no_classes else None)
        return result

    def _measured(self, inputs: AnalysisInputs) -> ExpertUtilizationResult:
        return expert_utilization(
            inputs.model,
            inputs.batches,
            class_names=self.class_names or class_names_of(inputs.context),
            forward_fn=self.forward_fn or call_model,
            label_fn=self.label_fn or labels_of,
            ignore_index=self.ignore_index,
            image_fn=self.image_fn or images_of,
            adapters=self.adapters,
            mask_fn=self.mask_fn,
            dead_below=self.dead_below,
            starved_below=self.starved_below,
            inert_below=self.inert_below,
            num_permutations=self.num_permutations,
            num_examples=self.num_examples,
            ablation=self.ablation,
            seed=self.seed,
            progress=inputs.progress,
            ranks=inputs.ranks,
        )

    @override
    def unsupported_if_sharded(self) -> str:
        return "ablation=True runs copies of the head. Pass ablation=False" if self.ablation else ""

    @override
    def report(self, result: ExpertUtilizationResult) -> Report:
        if not result.heads:
            return Report(result.metrics(self.detail))
        return Report(result.metrics(self.detail), result.texts(self.detail), result.figures(self.detail))

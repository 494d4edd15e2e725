"""Options that all analyses share, and their checks."""

from collections.abc import Sequence
from typing import Literal, Protocol, TypedDict, get_args

from moe_heads.analysis._shared.batches import LossFn
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.progress import check_max_time
from moe_heads.callbacks._shared.trainer_access import Split
from moe_heads.checks import check_at_least_one, check_choices, check_option, check_positive, check_seed

__all__ = ["AnalysisOptions", "OnError", "Options", "OverRanks", "Stage", "Weights", "check_options"]

OnError = Literal["warn", "raise"]

Stage = Literal["fit", "validate", "test"]
"""A method of the Trainer after which an analysis runs."""

Weights = Literal["last", "best"]

OverRanks = Literal["same", "share", "rank_zero"]
"""Work of several processes: the same on all ranks, a share of the samples each, or rank zero alone."""


class AnalysisOptions(TypedDict, total=False):
    """Keyword arguments of every analysis, all with a default.

    Args:
        splits: Splits to analyze, of "train", "val" and "test"; by default train and test. A missing test loader is
            replaced by the validation data, with a warning. A split without data is skipped, with a warning.
        num_samples: Number of samples drawn from each split; by default 1,000 as in arXiv 2601.15021.
        batch_size: Samples in a batch, divided among the processes that share the work. The default is 250, and 50 for
            the sharpness, whose trace needs fewer probes with more batches; it is limited to the batch size of the
            loader. It affects memory and speed, but not the estimated quantity if the loss is a mean over the samples
            of a batch. Otherwise a warning states the size of the effect. A custom batch sampler keeps its batches.
        seed: Seed of the draw and of the analysis, by default 0.
        loss_fn: ``loss_fn(pl_module, batch) -> scalar``; by default the module's ``analysis_loss(batch)``, else the
            output of its ``training_step``.
        batch_size_fn: ``batch_size_fn(batch) -> int``, the number of samples of a batch. By default it is the number of
            indices, or it is inferred from the tensors if the data set returns whole batches.
        batch_weight_fn: ``batch_weight_fn(batch) -> float``, the weight of a batch's loss, if that is a mean over
            something other than samples, such as tokens; by default the number of samples.
        stages: Methods of the Trainer after which to run, of "fit", "validate" and "test". By default None: "fit", and
            the other two only if this callback has not been part of a fit, so that ``trainer.test`` after a fit does
            not repeat the analysis.
        every_n_epochs: Run also at the end of every n-th training epoch, on the weights at that time; see
            ``FitEndAnalysis.tracked``. By default None, never.
        every_n_train_steps: Run also whenever ``trainer.global_step``, the number of optimizer steps, reaches or passes
            a multiple of n, on the weights at that time; see ``FitEndAnalysis.tracked_steps``. The expert utilization
            reports the training batches since its last point instead and runs no extra pass. Both intervals may be
            given. By default None, never.
        max_overhead: Run also during the training, at steps that the clock chooses: the points take at most this share
            of the time of the training without them. A point begins when this share of the time so far covers all
            points so far and the expected cost of this one. Where 1000 steps do not pay for a point, it is made
            smaller. The steps are not reproducible. Not with ``every_n_train_steps``, the reproducible choice. By
            default None, never.
        weights: "last", the default: the weights at the end of fit; "best": those of the best checkpoint, loaded for
            the analysis. The last weights are restored afterwards.
        max_time: Time limit in seconds for one split, after which the partial result is used and marked as partial; by
            default None, no limit.
        on_error: "warn", the default: a failed analysis is reported and the others continue; "raise": its error ends
            the run.
        name: First part of the keys; by default the name of the analysis. Two analyses of the same class in one Trainer
            need two names.
    """

    splits: Sequence[Split] | None
    num_samples: int | None
    batch_size: int | None
    seed: int
    loss_fn: LossFn | None
    batch_size_fn: BatchSizeFn | None
    batch_weight_fn: BatchWeightFn | None
    stages: Sequence[Stage] | None
    every_n_epochs: int | None
    every_n_train_steps: int | None
    max_overhead: float | None
    weights: Weights
    max_time: float | None
    on_error: OnError
    name: str | None


class Options(Protocol):
    """Options of an analysis as attributes, with defaults filled in."""

    splits: Sequence[Split]
    num_samples: int
    batch_size: int
    is_batch_size_default: bool
    seed: int
    loss_fn: LossFn | None
    batch_size_fn: BatchSizeFn | None
    batch_weight_fn: BatchWeightFn | None
    stages: Sequence[Stage] | None
    every_n_epochs: int | None
    every_n_train_steps: int | None
    max_overhead: float | None
    weights: Weights
    max_time: float | None
    on_error: OnError
    name: str


def check_options(options: Options, *, needs_loss: bool) -> None:
    """Check the values of the options.

    Args:
        options: The options.
        needs_loss: Whether the analysis evaluates a loss.

    Raises:
        ValueError: If an option is invalid.
    """
    check_choices("splits", options.splits, get_args(Split))
    if options.stages is not None:
        check_choices("stages", options.stages, get_args(Stage))
    check_at_least_one(num_samples=options.num_samples, batch_size=options.batch_size)
    check_at_least_one(
        or_none=True, every_n_epochs=options.every_n_epochs, every_n_train_steps=options.every_n_train_steps
    )
    _check_overhead(options.max_overhead, options.every_n_train_steps)
    check_seed(options.seed)
    check_option("weights", options.weights, get_args(Weights))
    check_option("on_error", options.on_error, get_args(OnError))
    check_max_time(options.max_time)
    if not isinstance(options.name, str) or not options.name.strip("/ ") or options.name != options.name.strip("/ "):
        raise ValueError(f"name: expected the first part of a key, such as 'sharpness_head', got {options.name!r}.")
    if options.loss_fn is not None and not callable(options.loss_fn):
        raise ValueError(f"loss_fn: expected loss_fn(module, batch) -> scalar, got {options.loss_fn!r}.")
    for name, function in {"batch_size_fn": options.batch_size_fn, "batch_weight_fn": options.batch_weight_fn}.items():
        if function is not None and not callable(function):
            raise ValueError(f"{name}: expected {name}(batch) -> number, got {function!r}.")
    if options.batch_weight_fn is not None and not needs_loss:
        raise ValueError(
            f"batch_weight_fn: expected None, as this analysis evaluates no loss, got {options.batch_weight_fn!r}."
        )
    if options.loss_fn is not None and not needs_loss:
        raise ValueError(f"loss_fn: expected None, as this analysis evaluates no loss, got {options.loss_fn!r}.")


def _check_overhead(max_overhead: float | None, every_n_train_steps: int | None) -> None:
    check_positive(or_none=True, max_overhead=max_overhead)
    if max_overhead is not None and max_overhead > 1:
        raise ValueError(
            f"max_overhead: expected a share of the training time, above 0 and at most 1, got {max_overhead!r}. Pass"
            " 0.02 for 2 %."
        )
    if max_overhead is not None and every_n_train_steps is not None:
        raise ValueError(
            f"max_overhead: expected None with every_n_train_steps={every_n_train_steps}, got {max_overhead!r}. Pass"
            " one of them: the clock chooses the steps of max_overhead."
        )

"""The options that all analyses share, and what is refused of them."""

from collections.abc import Sequence
from typing import Literal, Protocol, TypedDict, get_args

from moe_heads.analysis._shared.batches import LossFn
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.progress import check_max_time
from moe_heads.callbacks._shared.trainer_access import Split
from moe_heads.checks import check_at_least_one, check_choices, check_option, check_seed

__all__ = ["AnalysisOptions", "OnError", "Options", "OverRanks", "Stage", "Weights", "check_options"]

OnError = Literal["warn", "raise"]

Stage = Literal["fit", "validate", "test"]
"""A call of the Trainer at whose end an analysis runs."""

Weights = Literal["last", "best"]

OverRanks = Literal["same", "share", "rank_zero"]
"""What several processes do: all the same, each a share of the samples, or rank zero alone."""


class AnalysisOptions(TypedDict, total=False):
    """Keyword arguments that every analysis takes; all of them have a default.

    Args:
        splits: Splits to analyze, of "train", "val" and "test"; by default train and test. A missing test loader falls
            back to the validation data, and says so; a split without data is skipped, and says so.
        num_samples: Samples drawn of each split; by default 1,000 as in arXiv 2601.15021.
        batch_size: Samples a batch, cut among the processes that share the work; by default 250, and 50 for the
            sharpness, whose trace needs fewer probes with more batches, but no more than the loader's batches have. It
            decides memory and speed, not what is estimated, as long as the loss is a mean over the samples of a batch:
            where it is not, a warning says by how much. A batch sampler of the loader's own keeps its batches.
        seed: Seed of the draw and of the analysis, by default 0.
        loss_fn: ``loss_fn(pl_module, batch) -> scalar``; by default the module's ``analysis_loss(batch)``, else what
            its ``training_step`` returns.
        batch_size_fn: ``batch_size_fn(batch) -> int``, the number of samples of a batch; by default the number that the
            data set was asked for, and for data that come in whole batches what their tensors agree on.
        batch_weight_fn: ``batch_weight_fn(batch) -> float``, the weight of a batch's loss, where that is a mean over
            something else than samples, tokens say; by default the number of samples.
        stages: Calls of the Trainer at whose end to run, of "fit", "validate" and "test"; by default None: "fit", and
            the other two where this callback has seen no fit, so that ``trainer.test`` after a fit analyses nothing
            once more.
        every_n_epochs: Run also at the end of every n-th training epoch, on the weights as they are then; see
            ``FitEndAnalysis.tracked``. By default None, never.
        weights: "last", the default: the weights at the end of fit; "best": those of the best checkpoint, loaded for
            the analysis and put back afterwards.
        max_time: Seconds for one split after which the best result so far is taken, marked as partial; by default
            None, any time.
        on_error: "warn", the default: an analysis that fails is reported and the others go on; "raise": its error ends
            the run.
        name: First part of the keys; by default the name of the analysis. Two analyses of one kind in one Trainer need
            two names.
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
    weights: Weights
    max_time: float | None
    on_error: OnError
    name: str | None


class Options(Protocol):
    """The same as attributes, with their defaults filled in."""

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
    weights: Weights
    max_time: float | None
    on_error: OnError
    name: str


def check_options(options: Options, *, needs_loss: bool) -> None:
    """Refuse what no Trainer could be analyzed with.

    Args:
        options: The options.
        needs_loss: Whether the analysis evaluates a loss.

    Raises:
        ValueError: If one of them is out of range; names it, what was expected and what came.
    """
    check_choices("splits", options.splits, get_args(Split))
    if options.stages is not None:
        check_choices("stages", options.stages, get_args(Stage))
    check_at_least_one(num_samples=options.num_samples, batch_size=options.batch_size)
    check_at_least_one(or_none=True, every_n_epochs=options.every_n_epochs)
    check_seed(options.seed)
    check_option("weights", options.weights, get_args(Weights))
    check_option("on_error", options.on_error, get_args(OnError))
    check_max_time(options.max_time)
    if not isinstance(options.name, str) or not options.name.strip("/ ") or options.name != options.name.strip("/ "):
        raise ValueError(f"name: expected the beginning of a key, such as 'sharpness_head', got {options.name!r}")
    if options.loss_fn is not None and not callable(options.loss_fn):
        raise ValueError(f"loss_fn: expected loss_fn(module, batch) -> scalar, got {options.loss_fn!r}")
    for name, function in {"batch_size_fn": options.batch_size_fn, "batch_weight_fn": options.batch_weight_fn}.items():
        if function is not None and not callable(function):
            raise ValueError(f"{name}: expected {name}(batch) -> number, got {function!r}")
    if options.batch_weight_fn is not None and not needs_loss:
        raise ValueError(
            f"batch_weight_fn: expected None, as this analysis evaluates no loss, got {options.batch_weight_fn!r}"
        )
    if options.loss_fn is not None and not needs_loss:
        raise ValueError(f"loss_fn: expected None, as this analysis evaluates no loss, got {options.loss_fn!r}")

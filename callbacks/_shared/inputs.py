"""Inputs of an analysis of one split: batches, loss, and the processes that share them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batch_list import Batches, Piece
from moe_heads.analysis._shared.batches import Batch, LossFn, cut, is_divisible, leaves_of
from moe_heads.analysis._shared.copies import own_copy
from moe_heads.analysis._shared.digest import digest_of, digest_of_rows
from moe_heads.analysis._shared.generators import seed_generators
from moe_heads.analysis._shared.mean_check import check_mean
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.callbacks._shared.evaluation import check_initialized, draws_random_numbers, loss_of
from moe_heads.callbacks._shared.execution_context import ExecutionContext
from moe_heads.callbacks._shared.options import Options, OverRanks
from moe_heads.callbacks._shared.sample import Sample, draw_sample
from moe_heads.callbacks._shared.sharding import batches_in_step, check_deterministic, key_over_ranks
from moe_heads.callbacks._shared.trainer_access import Split
from moe_heads.callbacks._shared.training_mode import explain_evaluation_mode

__all__ = ["AnalysisInputs", "prepare"]


@dataclass(frozen=True)
class AnalysisInputs:
    """Inputs of the `FitEndAnalysis.compute` method of an analysis.

    Attributes:
        model: The module, on the device of the analysis, in evaluation mode.
        loss_fn: ``loss_fn(model, batch) -> scalar``. It raises an error in an analysis without ``needs_loss``.
        batches: Batches on the same device, with their numbers of samples and weights: the whole sample, or this rank's
            share of it.
        split: Split of the batches.
        cut: Number of processes that share the sample, and number of samples of each of its batches.
        key: Fingerprint of the weights and the sample. It does not depend on the division into batches.
        progress: Progress for the functions of this package. Other code calls its ``step``.
        ranks: The processes that share the sample; a single one unless ``over_ranks`` is "share".
        context: Context of the run: its Trainer, loop or call.
    """

    model: nn.Module
    loss_fn: LossFn
    batches: Batches
    split: Split
    key: bytes
    cut: tuple[int, ...]
    progress: Progress
    ranks: Ranks
    context: ExecutionContext


class AnalysisTraits(Options, Protocol):
    """Attributes of an analysis that `prepare` uses."""

    needs_loss: ClassVar[bool]
    fallbacks: ClassVar[Mapping[Split, Sequence[Split]]]
    over_ranks: OverRanks


def prepare(
    context: ExecutionContext,
    model: nn.Module,
    split: Split,
    analysis: AnalysisTraits,
    progress: Progress,
    ranks: Ranks,
) -> tuple[AnalysisInputs, Sample] | None:
    """Draw the sample, divide it among the ranks, find the loss and evaluate it once.

    Rank zero draws, so that all ranks have the same samples, also for a stream.

    Args:
        context: Context of the analysis.
        model: The module, on the device of the analysis.
        split: The requested split.
        analysis: The analysis.
        progress: Receives a step for each drawn batch.
        ranks: The processes.

    Returns:
        The inputs and the whole sample; None if there is no data.

    Raises:
        MisconfigurationException: If there is no loss, or parameters are not initialized yet.
        ValueError: If the sample is empty or the loss is invalid.
    """
    shares = analysis.over_ranks == "share"
    with ranks.synchronized():
        check_initialized(model)
        loss_fn = loss_of(model, analysis.loss_fn or context.loss_fn) if analysis.needs_loss else _no_loss
        # random augmentation gives the same samples in every analysis with the same seed
        seed_generators(analysis.seed)
        found = context.loader(split, analysis.fallbacks.get(split, ()))
    # rank zero draws, so its data decide
    there = ranks.run_on_rank_zero(lambda: None if found is None else found[0])
    if there is None:
        return None
    split = there

    def draw() -> Sample:
        num_samples, num_batches = context.limits(split, analysis.num_samples)
        assert found is not None
        return draw_sample(
            split,
            found[1],
            num_samples,
            analysis.batch_size,
            analysis.seed,
            dataset=context.dataset(split) if num_batches is None else None,
            num_batches=num_batches,
            progress=progress,
            is_size_default=analysis.is_batch_size_default,
            batch_size_fn=analysis.batch_size_fn,
        )

    sample = ranks.run_on_rank_zero(draw)
    # the weights of the context belong to its own loss
    weight_fn = analysis.batch_weight_fn or (None if analysis.loss_fn else context.batch_weight_fn)
    weight_fn = weight_fn if analysis.needs_loss else None
    with ranks.synchronized():
        is_random, may_cut = False, True
        moved: list[Batch] = []
        if analysis.needs_loss:
            batch = context.transfer(own_copy(sample.batches[0]))
            moved = [batch]
            first = Batches([batch], sample.batches.sizes[:1], weight_fn=weight_fn)
            try:
                is_random = draws_random_numbers(model, loss_fn, first, ranks.name)
            except Exception as error:  # of any kind: this is code of the user
                explain_evaluation_mode(model, loss_fn, batch, error)
                _add_size(error, first.num_samples, getattr(found[1] if found else None, "batch_size", None))
                raise
            if shares and ranks.size > 1 and not is_random:
                # the analysis itself issues the warning, for all batches
                may_cut = check_mean(model, loss_fn, first, progress=Progress(on_warning=lambda message: None)).may_cut
        check_deterministic(model, ranks, is_random=is_random)
    may_cut = all(ranks.gather(may_cut))
    if shares and ranks.size > 1 and any(ranks.gather(is_random)):
        # random numbers drawn for a part of a batch differ from those of a single process
        shares = False
    key = key_over_ranks(model, ranks.run_on_rank_zero(lambda: _key(model, sample)), ranks)
    share = batches_in_step(model, _share(sample.batches, ranks, may_cut=may_cut), ranks) if shares else None
    with ranks.synchronized():
        mine = share or sample.batches
        moved = [] if share else moved
        moved += [context.transfer(own_copy(batch)) for batch in mine[len(moved) :]]
        batches = Batches(moved, mine.sizes, weight_fn=weight_fn)
    sharing = ranks if share else Ranks(name=ranks.name)
    cuts = (sharing.size, *sample.batches.sizes)
    return AnalysisInputs(model, loss_fn, batches, split, key, cuts, progress, sharing, context), sample


def _no_loss(model: nn.Module, batch: Batch) -> Tensor:
    raise RuntimeError("inputs.loss_fn: expected an analysis with needs_loss = True, got one without a loss.")


def _add_size(error: Exception, num_samples: int, trained: Any) -> None:
    """Add a note to an error of the loss if the batch size of training differs, since a module may need it."""
    if isinstance(trained, int) and trained != num_samples:
        error.add_note(
            f"(the batch holds {num_samples} samples, and the training batches {trained}. If the module needs this"
            f" size, pass batch_size={trained} and a multiple of it as num_samples)"
        )


def _key(model: nn.Module, sample: Sample) -> bytes:
    weights = [*model.parameters(), *model.buffers(), [p.requires_grad for p in model.parameters()]]
    return digest_of([*weights, *_contents(sample.batches)])


def _contents(batches: Sequence[Batch]) -> list[Any]:
    """Return the contents of the batches; for divisible batches, they do not depend on the division into batches."""
    inside = [leaves_of(batch) for batch in batches]
    forms = {tuple(leaf is None for leaf in leaves) for leaves in inside}
    if len(forms) > 1 or not all(map(_has_rows, batches)):
        return [leaf for leaves in inside for leaf in leaves]
    return [None if column[0] is None else digest_of_rows(column) for column in zip(*inside, strict=True)]


def _has_rows(batch: Batch) -> bool:
    """Return whether a batch holds only dense tensors with one row for each sample."""
    tensors = [leaf for leaf in leaves_of(batch) if leaf is not None]
    return is_divisible(batch) and not any(leaf.is_nested or leaf.layout != torch.strided for leaf in tensors)


def _share(batches: Sequence[Batch], ranks: Ranks, *, may_cut: bool = True) -> Batches | None:
    """Return this rank's part of each batch; batches that cannot be cut go to the ranks in turn.

    Returns None for a single rank, and if a rank would get no samples.

    Args:
        batches: The batches of all ranks.
        ranks: The processes.
        may_cut: Whether the loss of a part of a batch is valid.
    """
    if ranks.size == 1:
        return None
    batches = Batches.of(batches)
    shares: list[list[tuple[Batch, int]]] = [[] for _ in range(ranks.size)]
    for index, (batch, size) in enumerate(zip(batches, batches.sizes, strict=True)):
        if size < ranks.size or not Piece(batch, size, size, may_cut).is_divisible:
            shares[index % ranks.size].append((batch, size))
            continue
        ends = [size * rank // ranks.size for rank in range(ranks.size + 1)]
        for rank, share in enumerate(shares):
            share.append((cut(batch, ends[rank], ends[rank + 1]), ends[rank + 1] - ends[rank]))
    if not all(shares):
        return None
    mine = shares[ranks.rank]
    return Batches([batch for batch, _ in mine], [size for _, size in mine])

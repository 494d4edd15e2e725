"""Check that a loss is a mean over the samples of its batch, by comparing whole batches with their halves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.batch_list import Batches, Piece, halves_of
from moe_heads.analysis._shared.batches import Batch, LossFn, to_device
from moe_heads.analysis._shared.copies import own_copy
from moe_heads.analysis._shared.environment import device_of
from moe_heads.analysis._shared.generators import random_states
from moe_heads.analysis._shared.graph_on_demand import GraphOnDemand
from moe_heads.analysis._shared.microbatches import free_memory, is_out_of_memory
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.scalar import is_scalar
from moe_heads.analysis._shared.shards import is_sharded

__all__ = ["CutDependence", "check_mean"]

# In units of the resolution of the data type: the relative change of a loss by another summation order or by another
# kernel for another batch size, and the absolute remainder when logits of some tens cancel.
_RELATIVE, _ABSOLUTE = 1000, 100

# A relative difference below this is negligible for any data type.
_NEGLIGIBLE = 1e-6

# A loss below this many absolute roundings is too close to zero to be compared.
_RESOLVED = 10

_REMEDY = (
    "Pass a loss_fn that is a mean over the samples, or pass the divisor of the loss as batch_weight_fn (for language"
    ' models lambda batch: (batch["labels"][:, 1:] != -100).sum()), or pass the batches of the training'
)


@dataclass(frozen=True)
class CutDependence:
    """Dependence of the mean loss on the division of the samples into batches.

    Attributes:
        size: Mean difference between the loss of a batch and that of its halves, as a fraction of the loss. 0.0 for a
            mean over the samples, None if it could not be determined.
        reason: Why it could not be determined; else "".
        is_sum: Whether the loss of a batch is the sum over its samples.
        halves_fail: Whether the loss of half a batch raises an error: the module needs whole batches.
    """

    size: float | None
    reason: str = ""
    is_sum: bool = False
    halves_fail: bool = False

    @property
    def may_cut(self) -> bool:
        """True if no effect of cutting a batch is known."""
        return not self.halves_fail and not self.size


def check_mean(
    model: nn.Module,
    loss_fn: LossFn,
    data: Batches,
    *,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    seed: int = 0,
) -> CutDependence:
    """Compare the loss of every batch with the weighted mean of its halves' losses, and warn if they differ.

    Hessian-vector products, traces and the points of a landscape are weighted means over the batches. They depend on
    the division of the samples into batches unless the loss is itself such a mean.

    The check costs two forward passes over the data. It enters `analysis_mode`, so call it outside of another one. A
    cached result for the same batches and loss is returned without a further warning.

    Args:
        model: The model.
        loss_fn: The loss.
        data: The batches of this process, on any device.
        progress: Receives the warning. A single process also checks its time limit before each batch.
        ranks: The processes that share the data.
        seed: Seed of torch's random numbers in every evaluation.
    """
    known = data.checked.get(id(loss_fn))
    if known is not None:
        found: CutDependence = known[1]
        return found
    progress, ranks = progress or Progress(), ranks or Ranks()
    if ranks.size > 1 and is_sharded(model):
        # the number of passes of the check depends on what a rank finds in its samples
        unknown = CutDependence(None, "the model is sharded")
        data.checked[id(loss_fn)] = loss_fn, unknown
        return unknown
    with ranks.synchronized(), analysis_mode(model, seed):
        check = _Check(model, loss_fn, seed)
        for piece in data.pieces:
            if ranks.size == 1:
                progress.tick()
            check.add(piece, data)
            if check.is_over:
                break
    together = _Sums.of(ranks.gather(check.sums))
    found = together.result()
    data.may_cut = data.may_cut and not found.halves_fail
    data.checked[id(loss_fn)] = loss_fn, found  # with the loss, so that its id is not given to another one
    if found.size and ranks.is_rank_zero:
        progress.warn(together.message(found))
    return found


@dataclass
class _Sums:
    """Sums over the batches of one process, or of all processes."""

    weight: float = 0.0
    size: float = 0.0
    difference: float = 0.0
    num_checked: int = 0
    num_different: int = 0
    num_sums: int = 0
    failed_halves: int = 0
    floor: float = 0.0
    reasons: list[str] = field(default_factory=list)
    example: tuple[int, float, float] | None = None

    @classmethod
    def of(cls, found: Sequence["_Sums"]) -> "_Sums":
        total = cls()
        for sums in found:
            for name in ("weight", "size", "difference", "num_checked", "num_different", "num_sums", "failed_halves"):
                setattr(total, name, getattr(total, name) + getattr(sums, name))
            total.floor = max(total.floor, sums.floor)
            total.reasons += sums.reasons
            total.example = total.example or sums.example
        return total

    def result(self) -> CutDependence:
        halves_fail = self.failed_halves > 0 and self.num_checked == 0
        if self.num_checked == 0:
            return CutDependence(None, (self.reasons or ["no batch could be halved"])[0], halves_fail=halves_fail)
        if self.num_different == 0:
            if self.size < _RESOLVED * self.floor * self.weight:
                return CutDependence(None, "the loss is too close to zero to be distinguished from rounding errors")
            return CutDependence(0.0)
        if not self.difference:
            return CutDependence(0.0)
        return CutDependence(self.difference / self.size, is_sum=self.num_sums == self.num_different)

    def message(self, found: CutDependence) -> str:
        assert found.size is not None
        if found.is_sum and self.example is not None:
            num_samples, first, second = self.example
            return (
                "loss_fn: expected the mean over the samples of a batch, got a sum: the loss of"
                f" {num_samples} samples is the sum of the losses of its halves, {first:.5g} and {second:.5g}. The"
                " results grow with batch_size."
                " Give the loss reduction='mean', or pass a loss_fn that is a mean."
            )
        return (
            f"loss_fn: expected the mean over the samples of a batch, got a loss that differs by {_percent(found.size)}"
            f" between a batch and its halves ({self.num_different} of {self.num_checked} batches). Eigenvalues, trace"
            f" and landscape depend on the division of the samples into batches. {_REMEDY}."
        )


class _Check:
    """A comparison of batches with their halves."""

    def __init__(self, model: nn.Module, loss_fn: LossFn, seed: int) -> None:
        self._model, self._loss_fn, self._seed = model, loss_fn, seed
        self._device, self._graph = device_of(model), GraphOnDemand()
        self._resolution = _resolution_of(model)
        self._draws = False
        self.sums = _Sums()
        self.is_over = False

    def add(self, piece: Piece, data: Batches) -> None:
        """Check one batch."""
        if not piece.is_divisible:
            why = "they hold one sample each" if piece.size == 1 else "their tensors do not have one row a sample"
            self.sums.reasons.append(f"the batches cannot be halved: {why}")
            return
        batch = to_device(piece.batch, self._device)
        piece = Piece(batch, piece.size, piece.weight, piece.may_cut)
        try:
            whole = self._loss(batch)
        except Exception as error:  # of any kind: the analysis itself raises it again
            self._record_failure(error)
            self.is_over = not is_out_of_memory(error)
            return
        if whole is None:
            self._end("the loss is not a scalar")
            return
        if self._draws and self._is_random(batch, whole):
            self._end("the loss draws random numbers")
            return
        halves = [half for half in halves_of(piece, data.weight_fn) if half.weight > 0]
        try:
            losses = [self._loss(half.batch) for half in halves]
        except Exception as error:  # of any kind: a module may take batches of one size only
            self._record_failure(error)
            self.sums.failed_halves += not is_out_of_memory(error)
            return
        finite = [loss for loss in (whole, *losses) if loss is not None and math.isfinite(loss)]
        if len(finite) < 1 + len(losses):
            self.sums.reasons.append("the loss of half a batch is not finite")
            return
        self._compare(piece, whole, halves, finite[1:])

    def _compare(self, piece: Piece, whole: float, halves: Sequence[Piece], losses: Sequence[float]) -> None:
        shares = [half.weight / piece.weight for half in halves]
        mean = sum(share * loss for share, loss in zip(shares, losses, strict=True))
        size = max(abs(whole), sum(share * abs(loss) for share, loss in zip(shares, losses, strict=True)))
        allowed = self._allowed(size)
        if abs(whole - mean) > allowed:
            again = self._loss(piece.batch)
            if again is None or abs(again - whole) > allowed:
                self._end("the loss differs on a repeat with the same weights and random numbers")
                return
            self.sums.num_different += 1
            if len(losses) == 2 and abs(whole - sum(losses)) <= allowed:
                self.sums.num_sums += 1
                self.sums.example = self.sums.example or (piece.size, losses[0], losses[1])
            self.sums.difference += piece.weight * abs(whole - mean)
        self.sums.num_checked += 1
        self.sums.weight += piece.weight
        self.sums.size += piece.weight * size
        self.sums.floor = _ABSOLUTE * self._resolution

    def _end(self, reason: str) -> None:
        self.sums, self.is_over = _Sums(reasons=[reason]), True

    def _record_failure(self, error: Exception) -> None:
        if is_out_of_memory(error):
            free_memory()
        self.sums.reasons.append(f"the loss of half a batch could not be computed: {type(error).__name__}: {error}")

    def _is_random(self, batch: Batch, loss: float) -> bool:
        other = self._loss(batch, self._seed + 1)
        return other is None or abs(other - loss) > self._allowed(max(abs(other), abs(loss)))

    def _allowed(self, size: float) -> float:
        """Return the largest difference of two losses of this size that rounding explains."""
        return max(_RELATIVE * self._resolution, _NEGLIGIBLE) * size + _ABSOLUTE * self._resolution

    def _loss(self, batch: Batch, seed: int | None = None) -> float | None:
        def evaluate() -> object:
            torch.manual_seed(self._seed if seed is None else seed)
            before = random_states(self._device)
            loss = self._loss_fn(self._model, own_copy(batch))
            after = random_states(self._device)
            self._draws = any(not torch.equal(one, two) for one, two in zip(before, after, strict=True))
            return loss

        loss = self._graph(evaluate)
        if not is_scalar(loss):
            return None
        self._resolution = max(self._resolution, _resolution(loss.dtype))
        return float(loss.detach())


def _resolution_of(model: nn.Module) -> float:
    """Return the coarsest resolution among the parameters that require a gradient."""
    return max((_resolution(p.dtype) for p in model.parameters() if p.requires_grad), default=0.0)


def _resolution(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %" if fraction < 1 else f"{100 * fraction:.0f} %"

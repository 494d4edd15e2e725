"""Comparison of products and of a derivative of the loss with float64 on a part of the samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import Batch, cut, is_divisible
from moe_heads.analysis._shared.microbatches import Microbatches, is_out_of_memory
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis.sharpness.hessian.basis import uniform
from moe_heads.analysis.sharpness.hessian.batch_gradients import BatchGradients
from moe_heads.analysis.sharpness.hessian.double_loss import DoubleLoss
from moe_heads.analysis.sharpness.hessian.finite_differences import (
    NUM_DIRECTIONS,
    Evaluate,
    FiniteDifferences,
    flat,
)
from moe_heads.analysis.sharpness.hessian.lean_check import LeanCheck, Piece

__all__ = ["LEAN_ABOVE", "DoubleCheck", "check_in_double"]

LEAN_ABOVE = 2**24
"""Number of parameters above which the check takes the memory of a few vectors; see `LeanCheck`."""

# Number of compared samples: all up to 32, then 5 %, at most 128. Rounding is a property of single samples.
_MIN_SAMPLES, _SHARE, _MAX_SAMPLES = 32, 0.05, 128

# For a large model. Each of them is evaluated alone, because the float64 graph is the largest part of the memory.
_MAX_LEAN_SAMPLES = 4

# Maximum number of batches to take them from, evenly spaced.
_MAX_PIECES = 8


@dataclass(frozen=True)
class DoubleCheck:
    r"""Differences between the products :math:`Hv` as computed and in float64, on some of the samples.

    Attributes:
        differences: :math:`\Delta v` for each vector, (P,) each, float64, with :math:`\Delta` the difference of the two
            Hessians. Empty if the loss draws random numbers, which differ in float64.
        direction: d, (P,), float64, with entries of size 1.
        product_difference: :math:`Hd` minus a central difference of the gradient along d, (P,), float64, less what
            rounding and noise explain.
        derivative_error: Largest difference between :math:`g \cdot d` and a central difference of the loss along three
            random directions d with entries of size 1, over the larger of :math:`\|g\|` and the quotient. nan if
            quotients at two step sizes differ too much.
        curvature_error: Length of ``product_difference``, over the length of the longer of the two; nan as above.
        repeat_error: Relative difference of the loss when it is evaluated a second time in the same way.
        num_samples: Number of compared samples.

    For a large model, the products are compared with differences of gradients in float64 (`LeanCheck`). The vectors are
    then in the precision of the model, and ``product_difference`` is zero, because ``differences`` contain it. With one
    vector, the difference is replaced by its length, and the others by one zero.
    """

    differences: tuple[Tensor, ...]
    direction: Tensor
    product_difference: Tensor
    derivative_error: float
    curvature_error: float
    repeat_error: float
    num_samples: int


def check_in_double(
    gradients: BatchGradients, data: Microbatches, vectors: list[Tensor], progress: Progress, seed: int = 0
) -> DoubleCheck | str:
    """Compare products and one directional derivative with float64.

    Args:
        gradients: Loss and gradient as the products evaluate them.
        data: The batches.
        vectors: The vectors to multiply with, (P,) each. For a large model, a single one is removed from the list.
        progress: Checked before each batch.
        seed: Seed of the directions.

    Returns:
        The differences, or a sentence with the reason why they cannot be computed.
    """
    model, loss_fn, params = gradients.model, gradients.loss_fn, gradients.params
    kinds = {t.dtype for t in model.parameters() if t.is_floating_point()} - {torch.float32, torch.float64}
    if kinds:
        return f"a part of the model computes in {', '.join(sorted(str(k).removeprefix('torch.') for k in kinds))}"
    is_lean = type(gradients) is BatchGradients and sum(p.numel() for p in params.values()) > LEAN_ABOVE
    for cuts in (True, False):
        if is_lean and not vectors:
            break  # the first attempt failed after it had released them
        pieces = _pieces(data, cuts, most=_MAX_LEAN_SAMPLES if is_lean else _MAX_SAMPLES)
        if is_lean and cuts:
            pieces = [part for piece in pieces for part in _single_samples(*piece)]
        try:
            draws = _draws_random_numbers(gradients, *pieces[0])
            if is_lean:
                if draws:
                    return "the loss draws random numbers, which differ in float64"
                return _compared_in_little_memory(gradients, pieces, vectors, progress, seed)
            if draws:
                vectors = []
            return _compared(gradients, DoubleLoss(model, loss_fn, params), pieces, vectors, progress, seed)
        except TimeUp:
            return f"{progress.end} before the check"
        except Exception as error:  # any error of the user's code, which may not run in float64 or on few samples
            if is_out_of_memory(error):
                return "there is not enough memory for the check"
            text = str(error).splitlines()
            reason = f"the model cannot be evaluated in float64 ({type(error).__name__}: {text[0] if text else ''})"
    return reason


def _compared(
    gradients: BatchGradients,
    double: DoubleLoss,
    pieces: Sequence[Piece],
    vectors: Sequence[Tensor],
    progress: Progress,
    seed: int,
) -> DoubleCheck:
    params, exact = list(gradients.params.values()), list(double.params.values())
    sizes = [p.numel() for p in params]
    tangents = [_parts(vector, params, sizes) for vector in vectors]
    differences = [torch.zeros(sum(sizes), dtype=torch.float64, device=params[0].device) for _ in tangents]
    derivatives = FiniteDifferences(exact, _directions(gradients, exact, seed))
    total = sum(count for *_, count in pieces)
    repeat_error = _repeat_error(_evaluation(gradients, double, pieces[0][0]), pieces[0][1], exact)
    for index, batch, count in pieces:
        progress.tick()
        evaluate = _evaluation(gradients, double, index)
        wide = gradients.linearized(double, index, batch, exact)
        derivatives.add(evaluate, batch, wide, count / total)
        progress.tick()
        if not tangents:
            continue
        _, narrow = gradients.gradient(index, batch)
        for found, tangent in zip(differences, tangents, strict=True):
            ours = gradients.differentiate(narrow, tangent, retain_graph=True)
            theirs = wide.product([t.double() for t in tangent])
            found.add_(flat(ours).double() - flat(theirs), alpha=count / total)
    has_product_error = derivatives.has_product_error
    for index, batch, count in pieces if has_product_error or derivatives.has_slope_error else ():
        progress.tick()
        evaluate = _evaluation(gradients, double, index)
        linearize = partial(gradients.linearized, double, index, batch, exact) if has_product_error else None
        derivatives.add_second_look(evaluate, batch, linearize, count / total)
    curvature_error, direction, product_difference = derivatives.product_error()
    return DoubleCheck(
        tuple(differences),
        direction,
        product_difference,
        derivatives.derivative_error,
        curvature_error,
        repeat_error,
        total,
    )


def _compared_in_little_memory(
    gradients: BatchGradients, pieces: Sequence[Piece], vectors: list[Tensor], progress: Progress, seed: int
) -> DoubleCheck:
    double = DoubleLoss(gradients.model, gradients.loss_fn, gradients.params)
    check = LeanCheck(gradients, double, pieces, progress)
    keeps = len(vectors) > 1  # for the trace
    first = vectors[0]
    along, _ = check.product_difference(first, keeps=keeps)
    if not keeps:
        vectors.clear()
    size, dtype, device = len(first), first.dtype, first.device
    del first
    probe = vectors[1] if keeps else uniform(size, dtype, device, torch.Generator().manual_seed(seed))
    sampled, curvature_error = check.product_difference(probe, keeps=keeps)
    differences = (along, sampled) if keeps else (along,)
    direction = probe if keeps else probe.new_zeros(1)
    return DoubleCheck(
        differences=differences,
        direction=direction,
        product_difference=torch.zeros_like(direction),
        derivative_error=check.derivative_error(probe),
        curvature_error=curvature_error,
        repeat_error=check.repeat_error,
        num_samples=sum(count for *_, count in pieces),
    )


def _single_samples(index: int, batch: Batch, size: int) -> list[Piece]:
    if size == 1 or not is_divisible(batch):
        return [(index, batch, size)]
    return [(index, cut(batch, place, place + 1), 1) for place in range(size)]


def _directions(gradients: BatchGradients, exact: Sequence[Tensor], seed: int) -> list[list[Tensor]]:
    """Draw directions with entries of size 1, and zero for weights that torch defines as constants."""
    generator = torch.Generator().manual_seed(seed)
    found = [
        [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device) for p in exact]
        for _ in range(NUM_DIRECTIONS)
    ]
    places = {id(p): place for place, p in enumerate(gradients.params.values())}
    for module in gradients.model.modules():
        # the rows of padding tokens have no gradient
        padding = getattr(module, "padding_idx", None)
        is_embedding = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        if is_embedding and padding is not None and id(module.weight) in places:
            for direction in found:
                direction[places[id(module.weight)]][padding] = 0
    return found


def _pieces(data: Microbatches, cuts: bool, most: int) -> list[Piece]:
    """Return index, samples and number of samples of the compared batches, cut where possible if ``cuts``."""
    batches, sizes = list(data), data.sizes
    wanted = min(max(_MIN_SAMPLES, int(_SHARE * data.num_samples)), most, data.num_samples)
    count = min(_MAX_PIECES, len(batches), wanted)
    places = sorted({round(i * (len(batches) - 1) / max(count - 1, 1)) for i in range(count)})
    pieces, left = [], wanted
    for number, place in enumerate(places):
        batch, size = batches[place], sizes[place]
        share = math.ceil(left / (len(places) - number))
        if cuts and share < size and is_divisible(batch):
            batch, size = cut(batch, 0, share), share
        pieces.append((data.origins[place], batch, size))
        left -= size
        if left <= 0:
            break
    return pieces


def _draws_random_numbers(gradients: BatchGradients, index: int, batch: Batch, _: int) -> bool:
    with gradients.evaluation(index):
        before = torch.get_rng_state()
        gradients.loss_fn(gradients.model, batch)
        return not torch.equal(before, torch.get_rng_state())


def _parts(vector: Tensor, params: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    return [part.view(p.shape) for part, p in zip(vector.split(list(sizes)), params, strict=True)]


def _evaluation(gradients: BatchGradients, double: DoubleLoss, index: int) -> Evaluate:
    def evaluate(batch: Batch, params: Sequence[Tensor]) -> Tensor:
        with gradients.random_numbers(index):
            return double(batch, params)

    return evaluate


def _repeat_error(evaluate: Evaluate, batch: Batch, params: Sequence[Tensor]) -> float:
    # without gradients, the loss raises an error if it uses parameters other than through the modules
    first, second = (float(evaluate(batch, [p.detach() for p in params]).detach()) for _ in range(2))
    return abs(first - second) / max(abs(first), abs(second), 1e-300)

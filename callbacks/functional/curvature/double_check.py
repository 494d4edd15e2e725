"""Products and a derivative of the loss compared with float64 on a part of the samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_heads.callbacks.functional.common.batches import Batch, cut, is_divisible
from moe_heads.callbacks.functional.common.microbatches import Microbatches, is_out_of_memory
from moe_heads.callbacks.functional.common.monitor import Monitor, TimeUp
from moe_heads.callbacks.functional.curvature.batch_gradients import BatchGradients
from moe_heads.callbacks.functional.curvature.double_loss import DoubleLoss

__all__ = ["DoubleCheck", "check_in_double"]

# Samples that are looked at: all up to 32, then 5 %, and not more than 128. Rounding is a property of single samples.
_FEWEST, _SHARE, _MOST = 32, 0.05, 128

# Batches from which they are taken, evenly spaced.
_MOST_PIECES = 8

# Step of the finite difference in units of the size of the weights: in float64 far above rounding, and small enough
# that next to no unit crosses a kink.
_STEP = 1e-6


@dataclass(frozen=True)
class DoubleCheck:
    r"""Differences between the products :math:`Hv` as they are computed and in float64, on some of the samples.

    Attributes:
        differences: :math:`\Delta v` for each vector, (P,) each, float64, with :math:`\Delta` the difference of the two
            Hessians; empty where the products are in float64 anyway.
        derivative_error: Difference between :math:`g \cdot d` and a central difference of the loss along a random
            direction d, over the larger of :math:`\|g\|` and the difference quotient; d has entries of size 1.
        num_samples: Samples that were looked at.
    """

    differences: tuple[Tensor, ...]
    derivative_error: float
    num_samples: int


def check_in_double(
    gradients: BatchGradients, data: Microbatches, vectors: Sequence[Tensor], monitor: Monitor, seed: int = 0
) -> DoubleCheck | str:
    """Compare products and one directional derivative with float64.

    Args:
        gradients: Loss and gradient as the products evaluate them.
        data: The batches.
        vectors: The vectors to multiply with, (P,) each.
        monitor: Looked at before each batch.
        seed: Seed of the direction.

    Returns:
        The differences; a sentence that says why they cannot be had where they cannot.
    """
    model, loss_fn, params = gradients.model, gradients.loss_fn, gradients.params
    kinds = {t.dtype for t in model.parameters() if t.is_floating_point()} - {torch.float32, torch.float64}
    if kinds:
        return f"a part of the model computes in {', '.join(sorted(str(k).removeprefix('torch.') for k in kinds))}"
    for cuts in (True, False):
        pieces = _pieces(data, cuts)
        try:
            if _draws_random_numbers(gradients, *pieces[0]):
                return "the loss draws random numbers, which are others in float64"
            double = DoubleLoss(model, loss_fn, params)
            double(pieces[0][1], [p.detach() for p in double.params.values()])
            return _compared(gradients, double, pieces, vectors, monitor, seed)
        except TimeUp:
            return f"{monitor.end} before it"
        except Exception as error:  # of any kind: code of the user's that cannot be run in float64, or on few samples
            if is_out_of_memory(error):
                return "there is not enough memory for it"
            text = str(error).splitlines()
            reason = f"the model cannot be evaluated in float64 ({type(error).__name__}: {text[0] if text else ''})"
    return reason


def _compared(
    gradients: BatchGradients,
    double: DoubleLoss,
    pieces: Sequence[tuple[int, Batch, int]],
    vectors: Sequence[Tensor],
    monitor: Monitor,
    seed: int,
) -> DoubleCheck:
    params, exact = list(gradients.params.values()), list(double.params.values())
    sizes = [p.numel() for p in params]
    is_exact = params[0].dtype == torch.float64
    tangents = [] if is_exact else [_parts(vector, params, sizes) for vector in vectors]
    differences = [torch.zeros(sum(sizes), dtype=torch.float64, device=params[0].device) for _ in tangents]
    generator = torch.Generator().manual_seed(seed)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device) for p in exact]
    _rest(gradients, direction)
    size = math.sqrt(sum(float(p.detach().square().sum()) for p in exact) / sum(sizes))
    step = _STEP * max(size, 1e-3)
    slope = quotient = norm = size_of_losses = 0.0
    total = sum(count for *_, count in pieces)
    for index, batch, count in pieces:
        monitor.tick()
        wide = torch.autograd.grad(
            double(batch), exact, create_graph=bool(tangents), allow_unused=True, materialize_grads=True
        )
        slope += count * sum(float((g.detach() * d).sum()) for g, d in zip(wide, direction, strict=True))
        norm += count * math.sqrt(sum(float(g.detach().square().sum()) for g in wide))
        with torch.no_grad():
            forward, back = (
                [p + sign * step * d for p, d in zip(exact, direction, strict=True)] for sign in (1.0, -1.0)
            )
        ends = [float(double(batch, moved).detach()) for moved in (forward, back)]
        quotient += count * (ends[0] - ends[1]) / (2 * step)
        size_of_losses += count * (1 + abs(ends[0]))
        if not tangents:
            continue
        monitor.tick()
        _, narrow = gradients.gradient(index, batch)
        for found, tangent in zip(differences, tangents, strict=True):
            ours = gradients.differentiate(narrow, tangent, retain_graph=True)
            theirs = _differentiated(wide, exact, [t.double() for t in tangent])
            flat = torch.cat([(a.double() - b).reshape(-1) for a, b in zip(ours, theirs, strict=True)])
            found.add_(flat, alpha=count / total)
    scale = max(norm, abs(quotient), abs(slope))
    # what a loss of size one rounds to is no error of the derivative
    error = max(abs(slope - quotient) - size_of_losses * 4e-16 / step, 0.0)
    return DoubleCheck(tuple(differences), error / scale if scale else 0.0, total)


def _pieces(data: Microbatches, cuts: bool) -> list[tuple[int, Batch, int]]:
    """Place, samples and number of samples of the batches that are looked at, cut where they can and may be cut."""
    batches, sizes = list(data), data.sizes
    wanted = min(max(_FEWEST, int(_SHARE * data.num_samples)), _MOST, data.num_samples)
    count = min(_MOST_PIECES, len(batches), wanted)
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


def _rest(gradients: BatchGradients, direction: Sequence[Tensor]) -> None:
    """Leave out the rows of padding tokens, which have no gradient by torch's definition: they are constants."""
    places = {id(p): part for p, part in zip(gradients.params.values(), direction, strict=True)}
    for module in gradients.model.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and padding is not None and id(module.weight) in places:
            places[id(module.weight)][padding] = 0


def _draws_random_numbers(gradients: BatchGradients, index: int, batch: Batch, _: int) -> bool:
    with gradients.evaluation(index):
        before = torch.get_rng_state()
        gradients.loss_fn(gradients.model, batch)
        return not torch.equal(before, torch.get_rng_state())


def _parts(vector: Tensor, params: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    return [part.view(p.shape) for part, p in zip(vector.split(list(sizes)), params, strict=True)]


def _differentiated(
    gradient: Sequence[Tensor], params: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Sequence[Tensor]:
    curved = [(g, t) for g, t in zip(gradient, tangents, strict=True) if g.requires_grad]
    if not curved:
        return [torch.zeros_like(p) for p in params]
    outputs, directions = zip(*curved, strict=True)
    return torch.autograd.grad(
        outputs, params, directions, retain_graph=True, allow_unused=True, materialize_grads=True
    )

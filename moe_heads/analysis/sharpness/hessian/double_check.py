"""Comparison of products and of a derivative of the loss with float64 on a part of the samples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import Batch, cut, is_divisible
from moe_heads.analysis._shared.microbatches import Microbatches, is_out_of_memory
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis.sharpness.hessian.batch_gradients import BatchGradients
from moe_heads.analysis.sharpness.hessian.double_loss import DoubleLoss

__all__ = ["DoubleCheck", "check_in_double"]

# Number of compared samples: all up to 32, then 5 %, at most 128. Rounding is a property of single samples.
_MIN_SAMPLES, _SHARE, _MAX_SAMPLES = 32, 0.05, 128

# Maximum number of batches to take them from, evenly spaced.
_MAX_PIECES = 8

# Step of a difference of losses in units of the size of the weights. In float64 it is far above rounding, and small
# enough that almost no unit crosses a kink.
_STEP = 1e-6

# The same for a difference of gradients, which jump at the kinks of a ReLU.
_SMALL_STEP = 1e-9

# Number of random directions along which the loss is differentiated.
_NUM_DIRECTIONS = 3

# Number of these along which the gradient is differentiated. The smallest difference counts, because now and then a
# unit crosses a kink along one of them, while a wrong product shows along all.
_NUM_PRODUCTS = 2

# Rounding of a gradient of size 1 in float64.
_ROUNDING = 1e-14

_Evaluate = Callable[[Batch, Sequence[Tensor]], Tensor]
"""Loss of one batch at given parameters, in float64, with the same random numbers in every call."""


@dataclass(frozen=True)
class DoubleCheck:
    r"""Differences between the products :math:`Hv` as computed and in float64, on some of the samples.

    Attributes:
        differences: :math:`\Delta v` for each vector, (P,) each, float64, with :math:`\Delta` the difference of the two
            Hessians. Empty if the loss draws random numbers, which differ in float64.
        direction: d, (P,), float64, with entries of size 1.
        product_difference: :math:`Hd` minus a central difference of the gradient along d, (P,), float64, less what
            rounding explains.
        derivative_error: Largest difference between :math:`g \cdot d` and a central difference of the loss along three
            random directions d with entries of size 1, over the larger of :math:`\|g\|` and the quotient.
        curvature_error: Length of ``product_difference``, over the length of the longer of the two.
        repeat_error: Relative difference of the loss when it is evaluated a second time in the same way.
        num_samples: Number of compared samples.
    """

    differences: tuple[Tensor, ...]
    direction: Tensor
    product_difference: Tensor
    derivative_error: float
    curvature_error: float
    repeat_error: float
    num_samples: int


def check_in_double(
    gradients: BatchGradients, data: Microbatches, vectors: Sequence[Tensor], progress: Progress, seed: int = 0
) -> DoubleCheck | str:
    """Compare products and one directional derivative with float64.

    Args:
        gradients: Loss and gradient as the products evaluate them.
        data: The batches.
        vectors: The vectors to multiply with, (P,) each.
        progress: Checked before each batch.
        seed: Seed of the directions.

    Returns:
        The differences, or a sentence with the reason why they cannot be computed.
    """
    model, loss_fn, params = gradients.model, gradients.loss_fn, gradients.params
    kinds = {t.dtype for t in model.parameters() if t.is_floating_point()} - {torch.float32, torch.float64}
    if kinds:
        return f"a part of the model computes in {', '.join(sorted(str(k).removeprefix('torch.') for k in kinds))}"
    for cuts in (True, False):
        pieces = _pieces(data, cuts)
        try:
            if _draws_random_numbers(gradients, *pieces[0]):
                vectors = ()
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
    pieces: Sequence[tuple[int, Batch, int]],
    vectors: Sequence[Tensor],
    progress: Progress,
    seed: int,
) -> DoubleCheck:
    params, exact = list(gradients.params.values()), list(double.params.values())
    sizes = [p.numel() for p in params]
    tangents = [_parts(vector, params, sizes) for vector in vectors]
    differences = [torch.zeros(sum(sizes), dtype=torch.float64, device=params[0].device) for _ in tangents]
    slopes = _Slopes(gradients, exact, seed)
    total = sum(count for *_, count in pieces)
    repeat_error = _repeat_error(_evaluation(gradients, double, pieces[0][0]), pieces[0][1], exact)
    for index, batch, count in pieces:
        progress.tick()
        evaluate = _evaluation(gradients, double, index)
        wide = _gradient(evaluate, batch, exact, create_graph=True)
        slopes.add(evaluate, batch, wide, count / total)
        progress.tick()
        if not tangents:
            continue
        _, narrow = gradients.gradient(index, batch)
        for found, tangent in zip(differences, tangents, strict=True):
            ours = gradients.differentiate(narrow, tangent, retain_graph=True)
            theirs = _differentiated(wide, exact, [t.double() for t in tangent])
            flat = torch.cat([(a.double() - b).reshape(-1) for a, b in zip(ours, theirs, strict=True)])
            found.add_(flat, alpha=count / total)
    return DoubleCheck(
        tuple(differences),
        slopes.direction,
        slopes.product_difference,
        slopes.derivative_error,
        slopes.curvature_error,
        repeat_error,
        total,
    )


class _Slopes:
    """Compares gradients with differences of losses, and products with differences of gradients."""

    def __init__(self, gradients: BatchGradients, exact: Sequence[Tensor], seed: int) -> None:
        self._exact = exact
        generator = torch.Generator().manual_seed(seed)
        self._directions = [self._direction(gradients, generator) for _ in range(_NUM_DIRECTIONS)]
        count = sum(p.numel() for p in self._exact)
        size = math.sqrt(sum(float(p.detach().square().sum()) for p in self._exact) / count)
        self._size = max(size, 1e-3)
        self._slopes, self._quotients = [0.0] * _NUM_DIRECTIONS, [0.0] * _NUM_DIRECTIONS
        self._norm = self._loss = 0.0
        self._products = [torch.zeros(count, dtype=torch.float64, device=exact[0].device) for _ in range(_NUM_PRODUCTS)]
        self._changes = [torch.zeros_like(product) for product in self._products]

    def add(self, evaluate: _Evaluate, batch: Batch, gradient: Sequence[Tensor], weight: float) -> None:
        """Add a batch with its gradient, which has a graph."""
        step = _STEP * self._size
        for place, direction in enumerate(self._directions):
            ends = [float(evaluate(batch, self._moved(direction, sign * step)).detach()) for sign in (1, -1)]
            self._quotients[place] += weight * (ends[0] - ends[1]) / (2 * step)
            slope = sum(float((g.detach() * d).sum()) for g, d in zip(gradient, direction, strict=True))
            self._slopes[place] += weight * slope
            self._loss += weight * abs(ends[0]) / _NUM_DIRECTIONS
        self._norm += weight * _length(gradient)
        step = _SMALL_STEP * self._size
        for direction, product, change in zip(self._directions, self._products, self._changes, strict=False):
            for sign in (1, -1):
                moved = [p.requires_grad_() for p in self._moved(direction, sign * step)]
                change.add_(_flat(_gradient(evaluate, batch, moved)), alpha=sign * weight / (2 * step))
            product.add_(_flat(_differentiated(gradient, self._exact, direction)), alpha=weight)

    @property
    def direction(self) -> Tensor:
        """The direction of ``product_difference``, flat."""
        return _flat(self._directions[self._best])

    @property
    def derivative_error(self) -> float:
        """Error of the gradient; see `DoubleCheck`."""
        # Rounding of a loss of this size is no error of the derivative.
        rounding = 4e-16 * (1 + self._loss) / (_STEP * self._size)
        pairs = zip(self._slopes, self._quotients, strict=True)
        errors = [(abs(s - q) - rounding) / max(self._norm, abs(q), 1e-300) for s, q in pairs]
        return max(0.0, *errors)

    @property
    def curvature_error(self) -> float:
        """Error of the product; see `DoubleCheck`."""
        return self._curvature_errors[self._best]

    @property
    def product_difference(self) -> Tensor:
        """Difference of the product from the quotient; see `DoubleCheck`."""
        return self._differences[self._best]

    @property
    def _best(self) -> int:
        return self._curvature_errors.index(min(self._curvature_errors))

    @property
    def _curvature_errors(self) -> list[float]:
        parts = zip(self._differences, self._products, self._changes, strict=True)
        return [float(d.norm()) / max(float(p.norm()), float(c.norm()), 1e-300) for d, p, c in parts]

    @property
    def _differences(self) -> list[Tensor]:
        rounding = _ROUNDING * (1 + self._norm) / (_SMALL_STEP * self._size)
        found = [product - change for product, change in zip(self._products, self._changes, strict=True)]
        lengths = [float(difference.norm()) for difference in found]
        shares = [max(length - rounding, 0.0) / max(length, 1e-300) for length in lengths]
        return [difference * share for difference, share in zip(found, shares, strict=True)]

    def _moved(self, direction: Sequence[Tensor], step: float) -> list[Tensor]:
        return [p.detach() + step * d for p, d in zip(self._exact, direction, strict=True)]

    def _direction(self, gradients: BatchGradients, generator: torch.Generator) -> list[Tensor]:
        found = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device) for p in self._exact]
        places = {id(p): part for p, part in zip(gradients.params.values(), found, strict=True)}
        for module in gradients.model.modules():
            # torch defines the rows of padding tokens as constants, without a gradient.
            padding = getattr(module, "padding_idx", None)
            if (
                isinstance(module, (nn.Embedding, nn.EmbeddingBag))
                and padding is not None
                and id(module.weight) in places
            ):
                places[id(module.weight)][padding] = 0
        return found


def _pieces(data: Microbatches, cuts: bool) -> list[tuple[int, Batch, int]]:
    """Return index, samples and number of samples of the compared batches, cut where possible if ``cuts``."""
    batches, sizes = list(data), data.sizes
    wanted = min(max(_MIN_SAMPLES, int(_SHARE * data.num_samples)), _MAX_SAMPLES, data.num_samples)
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


def _evaluation(gradients: BatchGradients, double: DoubleLoss, index: int) -> _Evaluate:
    def evaluate(batch: Batch, params: Sequence[Tensor]) -> Tensor:
        with gradients.random_numbers(index):
            return double(batch, params)

    return evaluate


def _repeat_error(evaluate: _Evaluate, batch: Batch, params: Sequence[Tensor]) -> float:
    # without gradients, the loss raises an error if it uses parameters other than through the modules
    first, second = (float(evaluate(batch, [p.detach() for p in params]).detach()) for _ in range(2))
    return abs(first - second) / max(abs(first), abs(second), 1e-300)


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in parts])


def _gradient(
    evaluate: _Evaluate, batch: Batch, params: Sequence[Tensor], *, create_graph: bool = False
) -> Sequence[Tensor]:
    loss = evaluate(batch, params)
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in params]
    return torch.autograd.grad(loss, params, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def _length(parts: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(part.detach().square().sum()) for part in parts))

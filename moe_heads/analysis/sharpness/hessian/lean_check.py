"""Comparison of products with differences of gradients in float64, in the memory of a few vectors.

The float64 graph of a gradient, with gradient and directions, takes some 25 vectors. Gradients alone, each part added
to the result as soon as backward has it, take six.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from moe_heads.analysis._shared.batches import Batch
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis.sharpness.hessian.batch_gradients import BatchGradients
from moe_heads.analysis.sharpness.hessian.double_loss import DoubleLoss
from moe_heads.analysis.sharpness.hessian.finite_differences import LOSS_ROUNDING, NUM_DIRECTIONS, SLOPE_STEP, TOO_NOISY

__all__ = ["LeanCheck", "Piece"]

Piece = tuple[int, Batch, int]
"""Index of the batch, samples, number of samples."""

# Steps of differences of gradients, in units of the size of the weights. The second is for models with kinks.
_STEPS = (1e-7, 1e-9)

# Relative difference that needs no second step.
_CLOSE = 1e-5

# Two differences of this ratio show a wrong product, and not noise.
_ALIKE = 0.5


class LeanCheck:
    """Differences between products and central differences of gradients in float64, on some of the samples.

    Args:
        gradients: Loss and gradient as the products evaluate them.
        double: The loss in float64.
        pieces: The samples.
        progress: Checked before each evaluation.

    Attributes:
        repeat_error: Relative difference of the loss when it is evaluated a second time in the same way.
    """

    def __init__(
        self, gradients: BatchGradients, double: DoubleLoss, pieces: Sequence[Piece], progress: Progress
    ) -> None:
        self._gradients, self._double, self._pieces, self._progress = gradients, double, pieces, progress
        self._params, self._exact = list(gradients.params.values()), list(double.params.values())
        self._sizes = [p.numel() for p in self._params]
        self._total = sum(count for *_, count in pieces)
        square = sum(float(p.detach().square().sum(dtype=torch.float64)) for p in self._params)
        self._size = max(math.sqrt(square / sum(self._sizes)), 1e-3)
        index, batch, _ = pieces[0]
        with gradients.random_numbers(index):
            # raises an error if the loss uses parameters other than through the modules
            first = float(double(batch, [p.detach() for p in self._exact]).detach())
        second = self._loss(index, batch)
        self.repeat_error = abs(first - second) / max(abs(first), abs(second), 1e-300)

    def product_difference(self, vector: Tensor, *, keeps: bool) -> tuple[Tensor, float]:
        r"""Return :math:`Hv` minus a difference of gradients, (P,), and its length over that of the longer of the two.

        The difference is that of the better one of two steps. The relative length is nan if kinks or noise explain it.

        Args:
            vector: v.
            keeps: Whether to return the difference. Otherwise its length takes its place, (1,).
        """
        ours = self._product(vector)
        length = float(torch.linalg.vector_norm(ours, dtype=torch.float64))
        unit = float(torch.linalg.vector_norm(vector, dtype=torch.float64)) / math.sqrt(len(vector))
        errors: list[float] = []
        best = ours.new_empty(0)
        for step in _STEPS:
            found = self._minus_quotient(ours, vector, step * self._size / max(unit, 1e-300))
            difference = float(found.norm())
            # the length of the quotient is at most that of the product and the difference
            errors.append(difference / max(length, difference, 1e-300))
            if errors[-1] == min(errors):
                best = found.to(ours.dtype) if keeps else found.norm()[None]
            del found
            if errors[-1] <= _CLOSE:
                break
        smaller, larger = min(errors), max(errors)
        return best, math.nan if smaller > TOO_NOISY and smaller < _ALIKE * larger else smaller

    def derivative_error(self, probe: Tensor) -> float:
        """Return the relative error of the gradient, the largest along directions made of the entries of a vector.

        It is nan if noise hides it; see `FiniteDifferences`.
        """
        slopes = torch.zeros(NUM_DIRECTIONS, dtype=torch.float64)
        squares = torch.zeros((), dtype=torch.float64)

        def add(weight: float, place: int, gradient: Tensor) -> None:
            squares.add_(float(gradient.square().sum()), alpha=weight)
            for number in range(NUM_DIRECTIONS):
                slopes[number] += weight * float((gradient * self._direction(probe, number, place)).sum())

        self._write(0.0, None)
        for index, batch, count in self._pieces:
            self._each_gradient(index, batch, partial(add, count / self._total))
        norm, step = math.sqrt(float(squares)), SLOPE_STEP * self._size
        quotients, loss = self._quotients(probe, step)
        rounding = LOSS_ROUNDING * (1 + loss) / step
        errors = (slopes - quotients).abs() - rounding
        sizes = quotients.abs().clamp_min(max(norm, 1e-300))
        if not bool((errors > 0).any()):
            return 0.0
        noise = 2 * float((quotients - self._quotients(probe, 2 * step)[0]).abs().max())
        if noise > TOO_NOISY * float(sizes.min()):
            return math.nan
        return float(((errors - noise) / sizes).max().clamp_min(0))

    def _product(self, vector: Tensor) -> Tensor:
        """Return the product as computed, (P,)."""
        total: Tensor | None = None
        tangents = [part.view(p.shape) for part, p in zip(vector.split(self._sizes), self._params, strict=True)]
        for index, batch, count in self._pieces:
            self._progress.tick()
            _, gradient = self._gradients.gradient(index, batch)
            graph = self._gradients.without_values(gradient)
            del gradient
            rows = list(self._gradients.differentiate(graph, tangents, retain_graph=False))
            del graph
            total = torch.zeros_like(vector) if total is None else total
            for place, part in enumerate(total.split(self._sizes)):
                part.view_as(rows[place]).add_(rows[place], alpha=count / self._total)
                rows[place] = rows[place].new_empty(0)
        assert total is not None
        return total

    def _minus_quotient(self, ours: Tensor, vector: Tensor, step: float) -> Tensor:
        found = ours.double()
        places, directions = found.split(self._sizes), vector.split(self._sizes)

        def add(weight: float, place: int, gradient: Tensor) -> None:
            places[place].view_as(gradient).add_(gradient, alpha=-weight)

        for sign in (1, -1):
            self._write(sign * step, directions.__getitem__)
            for index, batch, count in self._pieces:
                self._each_gradient(index, batch, partial(add, sign * count / self._total / (2 * step)))
        return found

    def _quotients(self, probe: Tensor, step: float) -> tuple[Tensor, float]:
        """Return the differences of the loss over the step along each direction, and the mean size of the loss."""
        quotients, size = torch.zeros(NUM_DIRECTIONS, dtype=torch.float64), 0.0
        for number in range(NUM_DIRECTIONS):
            direction = partial(self._direction, probe, number)
            for sign in (1, -1):
                self._write(sign * step, direction)
                for index, batch, count in self._pieces:
                    loss = self._loss(index, batch)
                    quotients[number] += sign * loss * count / self._total / (2 * step)
                    size += abs(loss) * count / self._total / (2 * NUM_DIRECTIONS)
        return quotients, size

    def _direction(self, probe: Tensor, number: int, place: int) -> Tensor:
        """Return a part of a direction: that of the vector, with entries shifted within the parameter."""
        part: Tensor = probe.split(self._sizes)[place].view(self._params[place].shape)
        if number == 0:
            return part
        shifted: Tensor = part.flatten().roll(7919 * number).view_as(part)
        return shifted if (place >> (number - 1)) % 2 else -shifted

    @torch.no_grad()
    def _write(self, step: float, direction: Callable[[int], Tensor] | None) -> None:
        """Set the float64 parameters to those of the model, moved by a step along a direction given by its parts."""
        for place, (wide, param) in enumerate(zip(self._exact, self._params, strict=True)):
            wide.copy_(param)
            if direction is not None:
                wide.add_(direction(place).view_as(wide), alpha=step)

    def _loss(self, index: int, batch: Batch) -> float:
        self._progress.tick()
        with torch.no_grad(), self._gradients.random_numbers(index):
            return float(self._double(batch))

    def _each_gradient(self, index: int, batch: Batch, consume: Callable[[int, Tensor], None]) -> None:
        """Call ``consume(place, part)`` for the part of the gradient of each parameter."""
        self._progress.tick()

        def hook(place: int, param: Tensor) -> None:
            assert param.grad is not None
            consume(place, param.grad)
            param.grad = None

        handles = [p.register_post_accumulate_grad_hook(partial(hook, i)) for i, p in enumerate(self._exact)]
        try:
            with self._gradients.random_numbers(index):
                loss = self._double(batch)
                if loss.requires_grad:
                    loss.backward(inputs=self._exact)
        finally:
            for handle in handles:
                handle.remove()

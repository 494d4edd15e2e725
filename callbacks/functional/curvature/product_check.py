"""The plain product of a batch, against which every other way to compute it is held."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_heads.callbacks.functional.common.batches import Batch
from moe_heads.callbacks.functional.curvature.batch_gradients import BatchGradients
from moe_heads.callbacks.functional.curvature.culprit import layer_of
from moe_heads.callbacks.functional.curvature.folding import Fold, find_folds
from moe_heads.callbacks.functional.curvature.loss_graph import NoSecondDerivative

__all__ = ["Product", "ProductCheck"]

Product = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""From a direction to the derivative of a batch's gradient in that direction, one tensor a parameter."""


class ProductCheck:
    """Computes one product by plain double backward.

    Args:
        gradients: The model and its loss, without folds.
        batch: The batch.

    Attributes:
        folds: Batch norms that look as if they could be folded.

    Raises:
        NoSecondDerivative: If a layer has none; names it.
    """

    def __init__(self, gradients: BatchGradients, batch: Batch) -> None:
        params = list(gradients.params.values())
        generator = torch.Generator().manual_seed(0)
        self._tangents = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in params]
        gradient: list[Tensor] = []
        try:
            self.folds: list[Fold] = find_folds(gradients.model, lambda: gradient.extend(gradients.gradient(0, batch)))
            self._expected = gradients.differentiate(tuple(gradient), self._tangents, retain_graph=False)
        except NoSecondDerivative as error:
            layer = layer_of(gradients.model, lambda: gradients.loss_fn(gradients.model, batch), str(error))
            if not layer:
                raise
            raise NoSecondDerivative(f"{layer}: {error}") from error.__cause__
        # Rounding moves a few units across the kink of a ReLU: 1e-3 lets them pass, and no wrong formula.
        self._tolerance = 1e-3 if params[0].dtype == torch.float32 else 1e-7

    def passes(self, product: Product) -> bool:
        """Whether a way gives this product, and gives it again."""
        for _ in range(2):
            found = product(self._tangents)
            pairs = zip(found, self._expected, strict=True)
            error = sum(float((a - b).square().sum(dtype=torch.float64)) for a, b in pairs)
            size = sum(float(b.square().sum(dtype=torch.float64)) for b in self._expected)
            if not error <= self._tolerance**2 * size:
                return False
        return True

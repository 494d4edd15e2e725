"""The weights of a model at a perturbed point, and the random perturbations."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from moe_heads.analysis._shared.contents import write_back

__all__ = ["PerturbedWeights"]


class PerturbedWeights:
    r"""The parameters at :math:`w + c \odot u`, moved in place; `analysis_mode` brings them back."""

    def __init__(self, chosen: Mapping[str, Tensor], adaptive: bool) -> None:
        self.params = tuple(chosen.values())
        self.adaptive = adaptive
        self.dtype, self.device = self.params[0].dtype, self.params[0].device
        self.sizes = [p.numel() for p in self.params]
        self._starts = [p.detach().clone() for p in self.params]
        self.num_fixed = sum(int((start == 0).sum()) for start in self._starts) if adaptive else 0

    def go(self, parts: Iterable[Tensor], scale: float = 1.0) -> None:
        """Move to ``scale`` times u, given by its part for each parameter."""
        for parameter, start, part in zip(self.params, self._starts, parts, strict=True):
            change = part.to(parameter).view_as(parameter) * scale
            write_back(parameter, start + (change.mul_(start.abs()) if self.adaptive else change))

    def normal(self, seed: int) -> Iterator[Tensor]:
        """Standard normal u, the same for the same seed on every device and rank.

        Yields:
            The part for each parameter.
        """
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.params:
            yield torch.randn(parameter.shape, generator=generator, dtype=self.dtype).to(self.device)

    def parts(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Parts of a flat vector (P,), views of it."""
        parts: tuple[Tensor, ...] = vector.split(self.sizes)
        return parts

    def scale_(self, parts: Iterable[Tensor]) -> None:
        """Multiply by c, in place."""
        if self.adaptive:
            for part, start in zip(parts, self._starts, strict=True):
                part.mul_(start.abs().view(-1))

    def random_start(self, seed: int) -> Tensor:
        """A random u, (P,), zero where nothing can move."""
        u = torch.cat([part.view(-1) for part in self.normal(seed)])
        for part, start in zip(self.parts(u), self._starts, strict=True):
            part.mul_((start != 0).view(-1) if self.adaptive else 1)
        return u

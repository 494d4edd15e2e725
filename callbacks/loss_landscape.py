"""Callback: the loss under finite perturbations of the trained weights, at the end of fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack, override

from moe_heads.callbacks.fit_end import FitEndAnalysis
from moe_heads.callbacks.functional import (
    LossLandscapeResult,
    SharpnessResult,
    filter_normalized,
    loss_landscape,
    random_direction,
)
from moe_heads.callbacks.functional.batches import Batch
from moe_heads.callbacks.functional.curvature import top_eigenvector
from moe_heads.callbacks.inputs import AnalysisInputs
from moe_heads.callbacks.options import AnalysisOptions, OverRanks
from moe_heads.callbacks.reporting import Mesh, Report
from moe_heads.callbacks.sharpness import SharpnessCallback
from moe_heads.callbacks.trainer_access import Split

__all__ = ["Landscape", "LossLandscapeCallback"]

# TensorBoard's mesh viewer addresses 65,536 vertices.
_MAX_PLANE_POINTS = 256


@dataclass(frozen=True)
class Landscape:
    """The two cuts through the loss of one split.

    Attributes:
        line: Along the top Hessian eigenvector, of unit length.
        plane: On a plane of two filter-normalised random directions; None for a split where it was not asked for.
    """

    line: LossLandscapeResult
    plane: LossLandscapeResult | None

    @property
    def partial(self) -> str:
        """Why one of them ended before its time; "" when both are whole."""
        return self.line.partial or (self.plane.partial if self.plane else "")


class LossLandscapeCallback(FitEndAnalysis):
    r"""Loss along the top Hessian eigenvector and on a filter-normalised plane, at the end of fit.

    The line is that of arXiv 2601.15021: 21 points of :math:`\theta + \alpha v`, :math:`\alpha` from -0.5 to 0.5. The
    eigenvector is taken from a `SharpnessCallback` that ran before on the same split and loss, else computed. The plane
    is that of Li et al. (arXiv 1712.09913). Logged at the end of fit, below ``loss_landscape/<split>/``: the numbers of
    `functional.LossLandscapeResult`, prefixed by ``line_`` and ``plane_``; to TensorBoard as well the figures ``line``
    and ``plane``, the 3-D mesh ``surface`` and the text ``summary``.

    Args:
        line_points: Points of the line; an odd number holds the centre.
        line_reach: Largest :math:`|\alpha|` of the line.
        plane_points: Points along each side of the plane. The cost is their square times one forward pass over the
            samples.
        plane_reach: Largest coordinate on the plane, where 1 is the norm of each filter.
        plane_splits: Splits whose plane is computed; by default the first of ``splits``, since it costs most, and since
            a browser shows no more than 16 surfaces at once: TensorBoard shows each surface of each run twice. An empty
            list for no plane.
        options: What all analyses share; see `FitEndAnalysis`.

    Example:
        >>> from moe_heads.callbacks import LossLandscapeCallback
        >>> LossLandscapeCallback(plane_splits=[]).line_points
        21
    """

    name = "loss_landscape"
    over_ranks: ClassVar[OverRanks] = "share"
    results: dict[Split, Landscape]

    def __init__(
        self,
        line_points: int = 21,
        line_reach: float = 0.5,
        plane_points: int = 15,
        plane_reach: float = 1.0,
        plane_splits: Sequence[Split] | None = None,
        **options: Unpack[AnalysisOptions],
    ) -> None:
        super().__init__(**options)
        if not isinstance(line_points, int) or line_points < 3:
            raise ValueError(f"line_points: expected at least 3; got {line_points}")
        if not isinstance(plane_points, int) or not 3 <= plane_points <= _MAX_PLANE_POINTS:
            raise ValueError(f"plane_points: expected 3 to {_MAX_PLANE_POINTS}; got {plane_points}")
        plane_splits = self.splits[:1] if plane_splits is None else plane_splits
        if not isinstance(plane_splits, (list, tuple)) or set(plane_splits) - set(self.splits):
            raise ValueError(f"plane_splits: expected some of splits = {self.splits}; got {plane_splits!r}")
        for argument, value in {"line_reach": line_reach, "plane_reach": plane_reach}.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{argument}: expected a finite number above 0; got {value!r}")
        self.line_points, self.line_reach = line_points, line_reach
        self.plane_points, self.plane_reach = plane_points, plane_reach
        self.plane_splits = tuple(plane_splits)

    @override
    def compute(self, inputs: AnalysisInputs) -> Landscape:
        assert inputs.loss_fn is not None
        options: dict[str, Any] = {
            "accuracy_fn": _accuracy_of(inputs.model),
            "seed": self.seed,
            "ranks": inputs.ranks,
        }
        line = loss_landscape(
            inputs.model,
            inputs.loss_fn,
            inputs.batches,
            direction1=self._top_eigenvector(inputs),
            alphas=torch.linspace(-self.line_reach, self.line_reach, self.line_points),
            monitor=inputs.monitor.part(lambda line: Landscape(line, None)),
            **options,
        )
        stand_ins = {other for split in self.plane_splits for other in self.fallbacks.get(split, ())} - {*self.splits}
        if line.partial or inputs.split not in {*self.plane_splits, *stand_ins}:
            return Landscape(line, None)
        first, second = (
            filter_normalized(inputs.model, random_direction(inputs.model, seed=2 * self.seed + i)) for i in (0, 1)
        )
        side = torch.linspace(-self.plane_reach, self.plane_reach, self.plane_points)
        plane = loss_landscape(
            inputs.model,
            inputs.loss_fn,
            inputs.batches,
            direction1=first,
            direction2=second,
            alphas=side,
            betas=side,
            monitor=inputs.monitor.part(lambda plane: Landscape(line, plane)),
            **options,
        )
        return Landscape(line, plane)

    @override
    def report(self, result: Landscape) -> Report:
        cuts = {"line": result.line} | ({} if result.plane is None else {"plane": result.plane})
        return Report(
            metrics={f"{cut}_{key}": value for cut, found in cuts.items() for key, value in found.metrics().items()},
            texts={"summary": "\n\n".join(f"### {cut.title()}\n\n{found.summary()}" for cut, found in cuts.items())},
            figures={cut: found.plot()[0] for cut, found in cuts.items()},
            meshes={"surface": Mesh(*result.plane.mesh())} if result.plane and result.plane.has_surface else {},
        )

    def _top_eigenvector(self, inputs: AnalysisInputs) -> Tensor:
        """Of a sharpness run on the same weights, samples and loss; computed where there is none."""
        callbacks = [] if inputs.trainer is None else inputs.trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, SharpnessCallback) and callback.loss_fn == self.loss_fn:
                found: SharpnessResult | None = callback.result_for(inputs)
                if found is not None and found.eigenvectors is not None:
                    return found.eigenvectors[0]
        assert inputs.loss_fn is not None
        return top_eigenvector(
            inputs.model,
            inputs.loss_fn,
            inputs.batches,
            seed=self.seed,
            monitor=inputs.monitor,
            ranks=inputs.ranks,
        )


def _accuracy_of(model: nn.Module) -> Callable[[nn.Module, Batch], Tensor] | None:
    """The module's own ``analysis_accuracy(batch)``, where it has one."""
    accuracy = getattr(model, "analysis_accuracy", None)
    return None if accuracy is None else lambda _, batch: accuracy(batch)

"""Callback: the loss under finite perturbations of the trained weights, at the end of fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
from moe_heads.callbacks.functional.common.batches import Batch
from moe_heads.callbacks.functional.common.monitor import Monitor, TimeUp
from moe_heads.callbacks.functional.common.parameters import trainable_parameters
from moe_heads.callbacks.functional.curvature import top_eigenvector
from moe_heads.callbacks.inputs import AnalysisInputs
from moe_heads.callbacks.options import AnalysisOptions, OverRanks
from moe_heads.callbacks.reporting import Mesh, Report
from moe_heads.callbacks.sharpness import SharpnessCallback
from moe_heads.callbacks.trainer_access import Split

__all__ = ["Landscape", "LossLandscapeCallback"]

# TensorBoard's mesh viewer addresses 65,536 vertices.
_MAX_PLANE_POINTS = 256

# Relative residual at which an eigenvector is good enough to be drawn along, and steps after which it is taken anyway.
_EIGENVECTOR_TOLERANCE, _EIGENVECTOR_STEPS = 1e-3, 200


@dataclass(frozen=True)
class Landscape:
    """The two cuts through the loss of one split.

    Attributes:
        line: Along the top Hessian eigenvector, of unit length; None where a layer has no second derivative.
        plane: On a plane of two filter-normalised random directions; None for a split where it was not asked for.
        ended: Why one of them is missing; "" when both are there.
    """

    line: LossLandscapeResult | None
    plane: LossLandscapeResult | None
    ended: str = ""

    @property
    def cuts(self) -> dict[str, LossLandscapeResult]:
        """Those that are there, by name."""
        return {name: cut for name, cut in (("line", self.line), ("plane", self.plane)) if cut is not None}

    @property
    def partial(self) -> str:
        """Why one of them ended before its time or is missing; "" when both are whole."""
        return next((reason for reason in (self.ended, *(cut.partial for cut in self.cuts.values())) if reason), "")


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
        options: What all analyses share; see `AnalysisOptions`.

    Example:
        >>> from moe_heads.callbacks import LossLandscapeCallback
        >>> LossLandscapeCallback(plane_splits=[]).line_points
        21
    """

    name = "loss_landscape"
    over_ranks: OverRanks = "share"
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
        line, failure = None, None
        try:
            line = self._line(inputs)
        except TimeUp:
            raise
        except Exception as error:
            # The plane needs no second derivative; what the line needs is told when the plane is there. Of any kind,
            # since on another rank it is of another kind.
            failure = error
        if failure is None:
            inputs.monitor.keep(lambda reason: Landscape(line, None, reason))
        is_cut_short = line is not None and line.partial
        plane = None
        if self._wants_plane(inputs.split) and not is_cut_short:
            try:
                plane = self._plane(inputs, line)
            except TimeUp:
                raise
            except Exception as error:
                failure = failure or error
        if failure is not None:
            if plane is not None:
                inputs.monitor.keep(lambda reason: Landscape(None, plane, reason))
            raise failure
        return Landscape(line, plane)

    @override
    def report(self, result: Landscape) -> Report:
        cuts = result.cuts
        metrics = {f"{cut}_{key}": value for cut, found in cuts.items() for key, value in found.metrics().items()}
        texts = [f"### {cut.title()}\n\n{found.summary()}" for cut, found in cuts.items()]
        if result.ended:
            texts.append(f"**Partial**: {result.ended}.")
        return Report(
            metrics=metrics | ({"partial": 1.0} if result.partial else {}),
            texts={"summary": "\n\n".join(texts)},
            figures={cut: found.plot()[0] for cut, found in cuts.items()},
            meshes={"surface": Mesh(*result.plane.mesh())} if result.plane and result.plane.has_surface else {},
        )

    def _line(self, inputs: AnalysisInputs) -> LossLandscapeResult:
        return self._landscape(
            inputs,
            inputs.monitor.part(lambda line: Landscape(line, None)),
            direction1=self._top_eigenvector(inputs),
            alphas=torch.linspace(-self.line_reach, self.line_reach, self.line_points),
        )

    def _wants_plane(self, split: Split) -> bool:
        stand_ins = {other for wanted in self.plane_splits for other in self.fallbacks.get(wanted, ())}
        return split in {*self.plane_splits, *(stand_ins - {*self.splits})}

    def _plane(self, inputs: AnalysisInputs, line: LossLandscapeResult | None) -> LossLandscapeResult:
        first, second = (
            filter_normalized(inputs.model, random_direction(inputs.model, seed=2 * self.seed + i)) for i in (0, 1)
        )
        side = torch.linspace(-self.plane_reach, self.plane_reach, self.plane_points)
        return self._landscape(
            inputs,
            inputs.monitor.part(lambda plane: Landscape(line, plane)),
            direction1=first,
            direction2=second,
            alphas=side,
            betas=side,
        )

    def _landscape(self, inputs: AnalysisInputs, monitor: Monitor, **grid: Any) -> LossLandscapeResult:
        assert inputs.loss_fn is not None
        return loss_landscape(
            inputs.model,
            inputs.loss_fn,
            inputs.batches,
            accuracy_fn=_accuracy_of(inputs.model),
            seed=self.seed,
            monitor=monitor,
            ranks=inputs.ranks,
            **grid,
        )

    def _top_eigenvector(self, inputs: AnalysisInputs) -> Tensor:
        """Of a sharpness run on the same weights, samples and loss; computed where there is none."""
        callbacks = [] if inputs.trainer is None else inputs.trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, SharpnessCallback) and callback.loss_fn == self.loss_fn:
                found: SharpnessResult | None = callback.result_for(inputs)
                vectors = None if found is None else found.eigenvectors
                if found is None or vectors is None or found.parameter_names != (*trainable_parameters(inputs.model),):
                    continue
                # more steps than that would not be taken here either
                if found.residuals[0] <= _EIGENVECTOR_TOLERANCE or (
                    found.engine == "lanczos" and found.num_steps >= _EIGENVECTOR_STEPS
                ):
                    return vectors[0]
        assert inputs.loss_fn is not None
        return top_eigenvector(
            inputs.model,
            inputs.loss_fn,
            inputs.batches,
            tolerance=_EIGENVECTOR_TOLERANCE,
            max_steps=_EIGENVECTOR_STEPS,
            seed=self.seed,
            monitor=inputs.monitor,
            ranks=inputs.ranks,
        )


def _accuracy_of(model: nn.Module) -> Callable[[nn.Module, Batch], Tensor] | None:
    """The module's own ``analysis_accuracy(batch)``, where it has one."""
    accuracy = getattr(model, "analysis_accuracy", None)
    return None if accuracy is None else lambda _, batch: accuracy(batch)

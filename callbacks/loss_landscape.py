"""Callback for the loss under finite perturbations of the trained weights at the end of fit."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import Unpack, override

from moe_heads.analysis import (
    DirectionSweepResult,
    LossLandscapeResult,
    direction_sweep,
    loss_landscape,
    normalized_random_direction,
)
from moe_heads.analysis._shared.batches import Batch
from moe_heads.analysis._shared.parameters import trainable_parameters
from moe_heads.analysis._shared.progress import TimeUp
from moe_heads.analysis._shared.shards import CHECKPOINT_REMEDY, is_sharded
from moe_heads.analysis.loss_landscape.direction_sweep import Normalization
from moe_heads.analysis.loss_landscape.directions import Biases
from moe_heads.analysis.loss_landscape.grid import grid_through_zero
from moe_heads.analysis.loss_landscape.points_file import stored_eigenvectors
from moe_heads.analysis.loss_landscape.trajectory import NoPlaneError, WeightHistory
from moe_heads.callbacks._landscape_eigenvectors import points_file, top_eigenvectors_of
from moe_heads.callbacks._landscape_report import Landscape, landscape_report
from moe_heads.callbacks._shared.execution_context import ExecutionContext
from moe_heads.callbacks._shared.inputs import AnalysisInputs
from moe_heads.callbacks._shared.options import AnalysisOptions, OverRanks
from moe_heads.callbacks._shared.reporting import Report
from moe_heads.callbacks._shared.trainer_access import Split
from moe_heads.callbacks._sharpness_options import check_are_in, check_differentiable, check_params
from moe_heads.callbacks.base import FitEndAnalysis
from moe_heads.checks import check_at_least, check_flags, check_option, check_positive

__all__ = ["Landscape", "LossLandscapeCallback"]

# TensorBoard's mesh viewer can address 65,536 vertices.
_MAX_PLANE_POINTS = 256

_Part = Callable[[AnalysisInputs, Landscape], LossLandscapeResult | DirectionSweepResult | None]


class LossLandscapeCallback(FitEndAnalysis):
    r"""Loss along the top Hessian eigenvector and on a filter-normalized plane, at the end of fit.

    The line is that of arXiv 2601.15021: 21 points of :math:`\theta + \alpha v`, :math:`\alpha` from -0.5 to 0.5. The
    eigenvector is taken from a `SharpnessCallback` that ran before on the same split, loss and parameters. Otherwise it
    is computed. The plane is that of Li et al. (arXiv 1712.09913). For a sparse head, the loss with the routing of the
    trained model is also measured. Logged at the end of fit, below ``loss_landscape/<split>/``:

    =============================  =================================================================================
    line_<quantity>, …             values of the line, see `moe_heads.analysis.LossLandscapeResult`
    plane_<quantity>, …            values of the plane
    trajectory_<quantity>, …       values of the plane of the training run (``trajectory``)
    sweep_<quantity>, …            values of the random directions (``num_directions``), see
                                   `moe_heads.analysis.DirectionSweepResult`
    line, plane, …                 figure of each part (TensorBoard)
    plane_flips,                   figures of a plane, if the quantity was measured (TensorBoard)
    plane_fixed_routing,
    plane_accuracy
    surface                        3-D mesh of the plane (TensorBoard)
    summary                        tables of all parts (TensorBoard)
    line.npz, plane.npz, …         arrays of each part, in the folder of the logger
    partial                        1 if max_time, an error or Ctrl-C ended the analysis early; else absent
    =============================  =================================================================================

    Args:
        line_points: Number of points of the line. An odd number includes the center.
        line_reach: Largest :math:`|\alpha|` of the line.
        plane_points: Number of points along each side of a plane. The cost is their square times one forward pass over
            the samples.
        plane_reach: Largest coordinate of the plane and of the sweep. 1 is the norm of each filter.
        plane_splits: Splits whose plane, sweep and trajectory plane are computed. An empty list disables them. Defaults
            to the first of ``splits``: planes cost the most, and a browser shows at most 16 surfaces at once, of which
            TensorBoard uses two for each surface of each run.
        plane_directions: "random", or "eigenvectors" for the first two of the Hessian, of unit length.
        normalization: Normalization of random directions: "filter", "layer" or "none", see
            `moe_heads.analysis.normalized_random_direction`.
        biases: Treatment of biases and norm parameters in random directions: "zero" as in the paper, or "normalized".
        params: Parameters that move, as names of parameters or modules such as ``["head"]``, ``["backbone"]`` or
            ``["head.router"]``. By default all that require a gradient. Modules before them are evaluated once.
        num_directions: Number of random directions of the sweep, 0 by default. Their spread measures how much the plane
            depends on its directions.
        trajectory: Store the weights of every epoch (on the CPU, as many numbers as there are moved parameters) and
            draw the run on its principal plane. It includes the parameters that require a gradient at the end and
            existed at all epochs.
        check_curvatures: Compare the curvature of each slice with that of the Hessian, at the cost of one product and
            four points each. It is skipped if the line along the top eigenvector failed.
        refine: Number of points to add to the line where it bends the most.
        resume: Folder for the points and eigenvectors of lines and planes. They are written during the analysis, and
            read if they exist. By default there is none. Below ``<name>/<split>/`` each line or plane has a file whose
            name has a digest of the weights, the sample and the direction. So epochs, trainings and callbacks use
            separate files, and an equal run continues. The files are not deleted.
        html: Also write ``landscape.html``, a page with rotatable surfaces, into the folder of the logger.
        options: Options of all analyses, see `AnalysisOptions`.

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
        plane_directions: Literal["random", "eigenvectors"] = "random",
        normalization: Normalization = "filter",
        biases: Biases = "zero",
        params: Sequence[str] | None = None,
        num_directions: int = 0,
        trajectory: bool = False,
        check_curvatures: bool = True,
        refine: int = 0,
        resume: str | os.PathLike[str] | None = None,
        html: bool = False,
        **options: Unpack[AnalysisOptions],
    ) -> None:
        super().__init__(**options)
        check_at_least(3, line_points=line_points)
        check_at_least(3, plane_points=plane_points)
        if plane_points > _MAX_PLANE_POINTS:
            raise ValueError(
                f"plane_points: expected 3 to {_MAX_PLANE_POINTS}, got {plane_points}. TensorBoard cannot draw more."
            )
        check_at_least(0, refine=refine, num_directions=num_directions)
        check_positive(line_reach=line_reach, plane_reach=plane_reach)
        check_option("plane_directions", plane_directions, ("random", "eigenvectors"))
        check_option("normalization", normalization, get_args(Normalization))
        check_option("biases", biases, get_args(Biases))
        check_flags(trajectory=trajectory, check_curvatures=check_curvatures, html=html)
        if resume is not None and (
            not isinstance(resume, (str, os.PathLike)) or not str(resume) or Path(resume).is_file()
        ):
            raise ValueError(f"resume: expected a folder, got {resume!r}.")
        check_params(params)
        if num_directions == 1:
            raise ValueError("num_directions: expected 0, or at least 2 that can be compared, got 1.")
        planes = self.splits[:1] if plane_splits is None else plane_splits
        if not isinstance(planes, (list, tuple)) or any(split not in self.splits for split in planes):
            raise ValueError(f"plane_splits: expected some of splits = {self.splits}, got {planes!r}.")
        self.plane_splits = tuple(planes)
        self.line_points, self.line_reach = line_points, line_reach
        self.plane_points, self.plane_reach = plane_points, plane_reach
        self.plane_directions, self.normalization, self.biases = plane_directions, normalization, biases
        self.params = params
        self.num_directions, self.trajectory, self.refine = num_directions, trajectory, refine
        self.check_curvatures, self.resume, self.html = check_curvatures, resume, html
        self._history, self._records_weights = WeightHistory(params), trajectory

    @override
    def check_model(self, context: ExecutionContext, model: nn.Module) -> None:
        check_are_in(model, self.params, None)
        if self.runs_in_fit:
            self._check_parameters(model)

    @override
    def begin_fit(self, context: ExecutionContext, model: nn.Module) -> None:
        super().begin_fit(context, model)
        self._history = WeightHistory(self.params)
        self._records_weights = self.trajectory and not is_sharded(model)
        if self._records_weights:
            self._history.record("start", model)
        elif self.trajectory:
            owner = type(self).__name__
            rank_zero_warn(f"{owner}: no trajectory, because the model is sharded. {CHECKPOINT_REMEDY}.")

    @override
    def end_epoch(self, context: ExecutionContext, model: nn.Module) -> None:
        if self._records_weights:
            self._history.record(f"epoch {context.epoch}", model)
        super().end_epoch(context, model)

    @override
    def unsupported_if_sharded(self) -> str:
        return ""

    def _check_parameters(self, model: nn.Module) -> None:
        owner = type(self).__name__
        check_differentiable(owner, model, self.params, only_real=True)
        try:
            check_differentiable(owner, model, self.params)
        except MisconfigurationException as error:
            rank_zero_warn(f"{error} The landscape has no line, whose direction is an eigenvector.")

    @override
    def compute(self, inputs: AnalysisInputs) -> Landscape:
        found: Landscape = self.result_for(inputs) or Landscape(None, None)
        failure: Exception | None = None
        for name, measure in self._parts(inputs.split):
            if name in found.parts:
                continue
            try:
                part = measure(inputs, found)
            except TimeUp:
                raise
            except Exception as error:
                # The other parts need no second derivative, so the error of the line is raised after them. Any kind of
                # error, since the kind differs between ranks.
                failure = failure or error
                continue
            found = replace(found, **{name: part})  # type: ignore[arg-type]
            inputs.progress.keep(partial(_ended, found))
            if found.partial:
                break
        if failure is not None:
            raise failure
        return found

    @override
    def is_enough(self, result: Landscape) -> bool:
        # the result that was tracked after the last epoch has no trajectory yet
        return not self._draws_trajectory or result.plane is None or result.trajectory is not None

    @override
    def report(self, result: Landscape) -> Report:
        return landscape_report(result, html=self.html)

    def _parts(self, split: Split) -> Iterator[tuple[str, _Part]]:
        """List the parts of a split, the cheapest first.

        Yields:
            Name of the part in a `Landscape`, and the method that measures it.
        """
        yield "line", self._line
        if not self._wants_plane(split):
            return
        yield "plane", self._plane
        if self.num_directions:
            yield "sweep", self._sweep
        if self._draws_trajectory:
            if self._history:
                yield "trajectory", self._trajectory
            else:
                rank_zero_warn(f"{self.name}/{split}: no trajectory, since no training was recorded by this callback.")

    @property
    def _draws_trajectory(self) -> bool:
        return self._records_weights and not self.is_tracking

    def _wants_plane(self, split: Split) -> bool:
        fallbacks = {other for wanted in self.plane_splits for other in self.fallbacks.get(wanted, ())}
        return split in {*self.plane_splits, *(fallbacks - {*self.splits})}

    def _line(self, inputs: AnalysisInputs, found: Landscape) -> LossLandscapeResult:
        return self._landscape(
            inputs,
            found,
            "line",
            direction1=self._top_eigenvectors(inputs, 1)[0],
            alphas=torch.linspace(-self.line_reach, self.line_reach, self.line_points),
            refine=self.refine,
            check_curvatures=self.check_curvatures,
        )

    def _plane(self, inputs: AnalysisInputs, found: Landscape) -> LossLandscapeResult:
        if self.plane_directions == "eigenvectors":
            first, second = self._top_eigenvectors(inputs, 2)
        else:
            first, second = (self._random_direction(inputs.model, 2 * self.seed + i) for i in (0, 1))
        side = torch.linspace(-self.plane_reach, self.plane_reach, self.plane_points)
        return self._landscape(
            inputs,
            found,
            "plane",
            direction1=first,
            direction2=second,
            alphas=side,
            betas=side,
            # if the line failed, a layer may have no second derivative
            check_curvatures=self.check_curvatures and found.line is not None,
        )

    def _trajectory(self, inputs: AnalysisInputs, found: Landscape) -> LossLandscapeResult | None:
        name = f"{self.name}/{inputs.split}"
        params = self._history.common_parameters(inputs.model)
        omitted = self._history.omitted_parameters(inputs.model)
        if params and omitted:
            rank_zero_warn(
                f"{name}: the trajectory omits {len(omitted)} parameters that moved, such as {omitted[0]!r}. They are"
                " frozen now, or did not exist at all epochs."
            )
        try:
            plane = self._history.plane(inputs.model)
        except NoPlaneError as error:
            rank_zero_warn(f"{name}: no trajectory: {error} One epoch gives a line. Train for two or more.")
            return None
        sides = [grid_through_zero(axis, self.plane_points) for axis in plane.trajectory.coordinates.T]
        return self._landscape(
            inputs,
            found,
            "trajectory",
            params=params,
            direction1=plane.direction1,
            direction2=plane.direction2,
            alphas=sides[0],
            betas=sides[1],
            trajectory=plane.trajectory,
        )

    def _sweep(self, inputs: AnalysisInputs, found: Landscape) -> DirectionSweepResult:
        return direction_sweep(
            inputs.model,
            inputs.loss_fn,
            inputs.batches,
            num_directions=self.num_directions,
            normalization=self.normalization,
            biases=self.biases,
            num_points=self.line_points,
            reach=self.plane_reach,
            params=self.params,
            seed=self.seed,
            progress=inputs.progress.part(lambda part: replace(found, sweep=part)),
            ranks=inputs.ranks,
        )

    def _landscape(self, inputs: AnalysisInputs, found: Landscape, name: str, **how: Any) -> LossLandscapeResult:
        directions = [how[key] for key in ("direction1", "direction2") if key in how]
        return loss_landscape(
            inputs.model,
            inputs.loss_fn,
            inputs.batches,
            accuracy_fn=_accuracy_of(inputs.model),
            seed=self.seed,
            resume=None if self.resume is None else self._file(inputs, name, directions),
            progress=inputs.progress.part(lambda part: replace(found, **{name: part})),
            ranks=inputs.ranks,
            **({"params": self.params} | how),
        )

    def _random_direction(self, model: nn.Module, seed: int) -> Tensor:
        return normalized_random_direction(model, seed, self.normalization, params=self.params, biases=self.biases)

    def _file(self, inputs: AnalysisInputs, part: str, depends_on: Sequence[Any]) -> Path:
        assert self.resume is not None
        # the division into batches changes the order of the sums, so points differ by rounding
        return points_file(Path(self.resume, self.name), inputs, part, [inputs.batches.weights, *depends_on])

    def _top_eigenvectors(self, inputs: AnalysisInputs, number: int) -> Tensor:
        find = partial(top_eigenvectors_of, inputs, number, self.loss_fn, self.params, self.seed)
        if self.resume is None:
            return find()
        names = [*trainable_parameters(inputs.model, self.params)]
        file = self._file(inputs, "eigenvectors", [number, self.seed, "\n".join(names)])
        return stored_eigenvectors(file, inputs.ranks, find)


def _ended(found: Landscape, reason: str) -> Landscape:
    return replace(found, ended=reason)


def _accuracy_of(model: nn.Module) -> Callable[[nn.Module, Batch], Tensor] | None:
    """Return the ``analysis_accuracy(batch)`` of the module, or None if it has none."""
    if not hasattr(model, "analysis_accuracy"):
        return None
    return lambda model, batch: cast(Any, model).analysis_accuracy(batch)

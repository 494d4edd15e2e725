"""Callback: the loss under finite perturbations of the trained weights, at the end of fit."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
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
from moe_heads.analysis.loss_landscape.direction_sweep import Normalization
from moe_heads.analysis.loss_landscape.directions import Biases
from moe_heads.analysis.loss_landscape.grid import grid_through_zero
from moe_heads.analysis.loss_landscape.trajectory import NoPlaneError
from moe_heads.callbacks._shared.inputs import AnalysisInputs
from moe_heads.callbacks._shared.options import AnalysisOptions, OverRanks
from moe_heads.callbacks._shared.reporting import Report
from moe_heads.callbacks._shared.trainer_access import Split
from moe_heads.callbacks.base import FitEndAnalysis
from moe_heads.callbacks.landscape_eigenvectors import top_eigenvectors_of
from moe_heads.callbacks.landscape_options import check_plane_points, checked_plane_splits
from moe_heads.callbacks.landscape_points import kept_eigenvectors, points_file
from moe_heads.callbacks.landscape_record import Landscape, landscape_report
from moe_heads.callbacks.landscape_trail import WeightTrail
from moe_heads.callbacks.sharpness_options import check_differentiable, check_list_of_names, check_names
from moe_heads.checks import check_at_least, check_flags, check_option, check_positive

__all__ = ["Landscape", "LossLandscapeCallback"]

_Part = Callable[[AnalysisInputs, Landscape], LossLandscapeResult | DirectionSweepResult | None]


class LossLandscapeCallback(FitEndAnalysis):
    r"""Loss along the top Hessian eigenvector and on a filter-normalized plane, at the end of fit.

    The line is that of arXiv 2601.15021: 21 points of :math:`\theta + \alpha v`, :math:`\alpha` from -0.5 to 0.5. The
    eigenvector is taken from a `SharpnessCallback` that ran before on the same split, loss and parameters, else
    computed. The plane is that of Li et al. (arXiv 1712.09913). With a sparse head the loss with the routing of the
    trained model held fixed is measured beside it. Logged at the end of fit, below ``loss_landscape/<split>/``: the
    numbers of `functional.LossLandscapeResult`, prefixed by ``line_``, ``plane_``, ``trajectory_``, and those of
    `functional.DirectionSweepResult`, prefixed by ``sweep_``; to TensorBoard as well a figure of each, of a plane also
    ``plane_flips``, ``plane_fixed_routing`` and ``plane_accuracy`` where there are any, the 3-D mesh ``surface`` and
    the text ``summary``; to the logger's folder the arrays, ``line.npz`` and so on.

    Args:
        line_points: Points of the line; an odd number holds the center.
        line_reach: Largest :math:`|\alpha|` of the line.
        plane_points: Points along each side of a plane. The cost is their square times one forward pass over the
            samples.
        plane_reach: Largest coordinate on the plane and of the sweep, where 1 is the norm of each filter.
        plane_splits: Splits whose plane is computed; by default the first of ``splits``, since it costs most, and since
            a browser shows no more than 16 surfaces at once: TensorBoard shows each surface of each run twice. An empty
            list for no plane. The same splits get the sweep and the plane of the trajectory.
        plane_directions: "random", or "eigenvectors" for the first two of the Hessian, of unit length.
        normalization: Of random directions: "filter", "layer" or "none"; see `functional.normalized_random_direction`.
        biases: What becomes of biases and norm parameters in these: "zero", as in the paper, or "normalized".
        params: Parameters that move, as names of parameters or modules such as ``["head"]``, ``["backbone"]`` or
            ``["head.router"]``; by default all that require a gradient. What lies before them is computed once.
        num_directions: Random directions of the sweep; by default 0, none. Their spread says how far the plane depends
            on its directions.
        trajectory: Keep the weights of every epoch (on the CPU, as many numbers as move) and draw the run on its
            principal plane: that of the parameters which require a gradient in the end and were there all along.
        check_curvatures: Compare the curvature of each slice with that of the Hessian; one product and four points
            more each. Left out where a layer has no second derivative.
        refine: Points to add to the line where it bends most.
        resume: Folder where the points of the lines and planes are kept as they come, with the eigenvectors, and taken
            from if they are there; by default none. Below ``<name>/<split>/`` each has a file for the weights, the
            sample and the direction, told by a digest in its name: epochs, trainings and callbacks do not meet, a run
            of the same goes on. The files stay until you delete them.
        html: Also write ``landscape.html``, a page to turn the surfaces in, into the logger's folder.
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
        check_plane_points(plane_points)
        check_at_least(0, refine=refine, num_directions=num_directions)
        check_positive(line_reach=line_reach, plane_reach=plane_reach)
        check_option("plane_directions", plane_directions, ("random", "eigenvectors"))
        check_option("normalization", normalization, get_args(Normalization))
        check_option("biases", biases, get_args(Biases))
        check_flags(trajectory=trajectory, check_curvatures=check_curvatures, html=html)
        if resume is not None and (
            not isinstance(resume, (str, os.PathLike)) or not str(resume) or Path(resume).is_file()
        ):
            raise ValueError(f"resume: expected a folder, got {resume!r}")
        if params is not None:
            check_list_of_names("params", params)
        if num_directions == 1:
            raise ValueError("num_directions: expected 0, or at least 2 that can be compared, got 1")
        self.plane_splits = checked_plane_splits(plane_splits, self.splits)
        self.line_points, self.line_reach = line_points, line_reach
        self.plane_points, self.plane_reach = plane_points, plane_reach
        self.plane_directions, self.normalization, self.biases = plane_directions, normalization, biases
        self.params = params
        self.num_directions, self.trajectory, self.refine = num_directions, trajectory, refine
        self.check_curvatures, self.resume, self.html = check_curvatures, resume, html
        self._trail = WeightTrail(params)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.params is not None and not is_overridden("configure_model", pl_module):
            # a name that is wrong is told before training, not after it
            check_names(pl_module, self.params, None)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.runs_in_fit:
            self._check_parameters(pl_module)
        self._trail = WeightTrail(self.params)
        if self.trajectory:
            self._trail.remember("start", pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.trajectory:
            self._trail.remember(f"epoch {trainer.current_epoch}", pl_module)
        super().on_train_epoch_end(trainer, pl_module)

    def _check_parameters(self, pl_module: LightningModule) -> None:
        owner = type(self).__name__
        check_differentiable(owner, pl_module, self.params, only_real=True)
        try:
            check_differentiable(owner, pl_module, self.params)
        except MisconfigurationException as error:
            rank_zero_warn(f"{error} The landscape is without its line, whose direction is an eigenvector.")

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
                # The others need no second derivative; what the line needs is told when they are there. Of any kind,
                # since on another rank it is of another kind.
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
        # what was tracked after the last epoch has no trajectory yet
        return not self._draws_trajectory or result.plane is None or result.trajectory is not None

    @override
    def report(self, result: Landscape) -> Report:
        return landscape_report(result, html=self.html)

    def _parts(self, split: Split) -> Iterator[tuple[str, _Part]]:
        """What is measured of a split, the cheapest first.

        Yields:
            Name of the part in a `Landscape`, and what measures it.
        """
        yield "line", self._line
        if not self._wants_plane(split):
            return
        yield "plane", self._plane
        if self.num_directions:
            yield "sweep", self._sweep
        if self._draws_trajectory:
            if self._trail:
                yield "trajectory", self._trajectory
            else:
                rank_zero_warn(f"{self.name}/{split}: no trajectory, since this callback has seen no training.")

    @property
    def _draws_trajectory(self) -> bool:
        return self.trajectory and not self.is_tracking

    def _wants_plane(self, split: Split) -> bool:
        stand_ins = {other for wanted in self.plane_splits for other in self.fallbacks.get(wanted, ())}
        return split in {*self.plane_splits, *(stand_ins - {*self.splits})}

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
            # where the line failed, a layer may have no second derivative
            check_curvatures=self.check_curvatures and found.line is not None,
        )

    def _trajectory(self, inputs: AnalysisInputs, found: Landscape) -> LossLandscapeResult | None:
        name = f"{self.name}/{inputs.split}"
        try:
            plane, params = self._trail.plane(inputs.model, name)
        except NoPlaneError as error:
            rank_zero_warn(f"{name}: no trajectory: {error}. One epoch gives a line; train for two, or more.")
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
        assert inputs.loss_fn is not None
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
        assert inputs.loss_fn is not None
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
        # other batches sum in another order: their points differ by rounding
        return points_file(Path(self.resume, self.name), inputs, part, [inputs.batches.weights, *depends_on])

    def _top_eigenvectors(self, inputs: AnalysisInputs, number: int) -> Tensor:
        find = partial(top_eigenvectors_of, inputs, number, self.loss_fn, self.params, self.seed)
        if self.resume is None:
            return find()
        names = [*trainable_parameters(inputs.model, self.params)]
        return kept_eigenvectors(
            self._file(inputs, "eigenvectors", [number, self.seed, "\n".join(names)]), inputs, find
        )


def _ended(found: Landscape, reason: str) -> Landscape:
    return replace(found, ended=reason)


def _accuracy_of(model: nn.Module) -> Callable[[nn.Module, Batch], Tensor] | None:
    """The module's own ``analysis_accuracy(batch)``, where it has one."""
    accuracy = getattr(model, "analysis_accuracy", None)
    return None if accuracy is None else lambda _, batch: accuracy(batch)

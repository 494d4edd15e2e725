"""The way of a training run, and the plane that holds most of it (Li et al. 2018)."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.parameters import Selection, trainable_parameters

__all__ = ["NoPlaneError", "Trajectory", "TrajectoryPlane", "read_states", "trajectory_plane"]

# Parameters that are held in double precision at once.
_PIECE = 2**18


class NoPlaneError(ValueError):
    """The weights of a run span no plane."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    r"""Weights :math:`\theta_t` along a run, seen from a plane through the model :math:`\theta`.

    Attributes:
        coordinates: Place of the point of the plane that is nearest to each, (T, 2), float64.
        residuals: Distance of each from the plane, (T,), float64: 0 for weights that lie in it. The loss on the plane
            is not that of weights which lie far off it.
        distances: Distance of each from the model, (T,), float64.
        explained_variance: Share of the sum of the squared distances along each direction.
        labels: What each is called: epochs, names of files.
    """

    coordinates: Tensor
    residuals: Tensor
    distances: Tensor
    explained_variance: tuple[float, float]
    labels: tuple[str, ...]

    def summary(self) -> str:
        """A sentence."""
        shares = " and ".join(f"{share:.0%}" for share in self.explained_variance)
        return (
            f"Trajectory of {len(self.labels)} points: the directions explain {shares} of it; up to"
            f" {float(self.residuals.max()):.3g} off the plane, up to {float(self.distances.max()):.3g} from the model."
        )


@dataclass(frozen=True, eq=False)
class TrajectoryPlane:
    """The plane of largest variance.

    Attributes:
        direction1: Unit direction of the largest variance, (P,), float32 or as the parameters are.
        direction2: That of the second largest, orthogonal to it.
        trajectory: The run on this plane.
    """

    direction1: Tensor
    direction2: Tensor
    trajectory: Trajectory


def trajectory_plane(
    model: nn.Module,
    states: Sequence[Mapping[str, Tensor] | Tensor],
    *,
    params: Selection | None = None,
    labels: Sequence[str] | None = None,
) -> TrajectoryPlane:
    r"""Principal plane of :math:`\theta_t - \theta` through the model :math:`\theta`, the weights as they are now.

    As Li et al. have it the differences are not centered, so that the model is the origin of the plane. Only trainable
    parameters count; where buffers (the statistics of batch norm) change along the run, the plane is that of the
    model's own.

    Args:
        model: The model; most often the last weights of the run.
        states: State dicts, or flat vectors (P,), in the order of the run; see `read_states` for a folder.
        params: The parameters that count; by default all that require a gradient.
        labels: What each is called; by default its number.

    Returns:
        The directions on the CPU, and the run on them.

    Raises:
        ValueError: If a state does not fit.
        NoPlaneError: If there are fewer than two, or all lie on a line through the model.

    Source:
        Li, Xu, Taylor, Studer and Goldstein, 2018, arXiv 1712.09913, section 7.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.loss_landscape.trajectory import trajectory_plane
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> theta = model.weight.detach().flatten()
        >>> steps = torch.tensor([[4.0, 0.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
        >>> plane = trajectory_plane(model, [theta + step for step in steps])
        >>> bool(plane.trajectory.residuals.max() < 1e-6)
        True
    """
    named = trainable_parameters(model, params)
    here = torch.cat([p.detach().cpu().reshape(-1) for p in named.values()])
    if len(states) < 2:
        raise NoPlaneError(f"states: expected at least two, got {len(states)}")
    if labels is not None and len(labels) != len(states):
        raise ValueError(f"labels: expected one for each of {len(states)} states, got {len(labels)}")
    flat = [_flat(state, named, number) for number, state in enumerate(states)]
    gram = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for steps in _pieces(flat, here):
        gram.addmm_(steps, steps.T)
    # principal components by the T × T matrix: a run has far fewer states than parameters
    values, vectors = torch.linalg.eigh(gram)
    if values[-2] <= 1e-12 * values[-1] or values[-1] <= 0:
        raise NoPlaneError("states: expected at least two that are not on one line through the model, got a line")
    weights = vectors[:, [-1, -2]] / values[[-1, -2]].sqrt()  # (T, 2): of the states in each unit direction
    directions = torch.cat([(weights.T @ steps).to(here.dtype) for steps in _pieces(flat, here)], dim=1)
    coordinates = gram @ weights
    squares = gram.diagonal()
    trajectory = Trajectory(
        coordinates=coordinates,
        residuals=(squares - coordinates.square().sum(1)).clamp(min=0).sqrt(),
        distances=squares.sqrt(),
        explained_variance=(float(values[-1] / values.sum()), float(values[-2] / values.sum())),
        labels=tuple(map(str, range(len(states)))) if labels is None else tuple(labels),
    )
    return TrajectoryPlane(directions[0], directions[1], trajectory)


def read_states(folder: str | os.PathLike[str], pattern: str = "*.ckpt") -> dict[str, Mapping[str, Tensor]]:
    """The state dicts in a folder of checkpoints by file name, in the order of their steps.

    A file holds a state dict, or a mapping with one as "state_dict", as Lightning writes it; these are in the order of
    their "global_step", others in that of the numbers in their names. Files that hold the same step count once.

    Args:
        folder: The folder.
        pattern: Which files.

    Raises:
        ValueError: If there is no such file.
    """
    files = sorted(Path(folder).glob(pattern), key=_numbers_in)
    if not files:
        raise ValueError(f"folder: expected files {pattern!r}; found none in {folder}")
    found: list[tuple[float, str, Mapping[str, Tensor]]] = []
    for order, path in enumerate(files):
        content: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        step = float(content.get("global_step", order))
        if "global_step" not in content or step not in [known for known, _, _ in found]:
            found.append((step, path.name, content.get("state_dict", content)))
    return {name: state for _, name, state in sorted(found, key=lambda entry: entry[0])}


def _numbers_in(path: Path) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"\d+", path.stem)], path.name


def _flat(state: Mapping[str, Tensor] | Tensor, named: Mapping[str, Tensor], number: int) -> Tensor:
    size = sum(p.numel() for p in named.values())
    if isinstance(state, Tensor):
        flat = state.detach().reshape(-1)
    else:
        missing = [name for name, p in named.items() if name not in state or state[name].shape != p.shape]
        if missing:
            raise ValueError(
                f"states: expected the model's {missing[0]!r} in each, in its shape; number {number} differs"
            )
        flat = torch.cat([state[name].detach().cpu().reshape(-1) for name in named])
    if flat.shape != (size,) or not bool(flat.isfinite().all()):
        raise ValueError(f"states: expected ({size},) finite numbers in each; number {number} differs")
    return flat.cpu()


def _pieces(flat: Sequence[Tensor], origin: Tensor) -> Iterator[Tensor]:
    """Differences of all states from the origin in double precision, some parameters at a time.

    Yields:
        The next piece, (T, ·).
    """
    for parts in zip(origin.split(_PIECE), *(one.split(_PIECE) for one in flat), strict=True):
        start, *ends = (part.double() for part in parts)
        yield torch.stack(ends) - start

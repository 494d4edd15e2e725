"""Trajectory of a training run, and the plane that explains most of it (Li et al. 2018)."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.names import check_names
from moe_heads.analysis._shared.parameters import Selection, trainable_parameters

__all__ = ["NoPlaneError", "Trajectory", "TrajectoryPlane", "WeightHistory", "read_states", "trajectory_plane"]

# Number of parameters that are converted to double precision at once.
_PIECE = 2**18


class NoPlaneError(ValueError):
    """Error for the weights of a run that do not span a plane."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    r"""Projection of the weights :math:`\theta_t` of a run onto a plane through the model :math:`\theta`.

    Attributes:
        coordinates: Coordinates of the projection of each state, (T, 2), float64.
        residuals: Distance of each state from the plane, (T,), float64, 0 for states in the plane. The loss on the
            plane does not represent states far from it.
        distances: Distance of each state from the model, (T,), float64.
        explained_variance: Fraction of the sum of squared distances along each direction.
        labels: Labels of the states, such as epochs or file names.
    """

    coordinates: Tensor
    residuals: Tensor
    distances: Tensor
    explained_variance: tuple[float, float]
    labels: tuple[str, ...]

    def summary(self) -> str:
        """Return a sentence on explained variance and distances."""
        shares = " and ".join(f"{share:.0%}" for share in self.explained_variance)
        return (
            f"The trajectory has {len(self.labels)} points. The directions explain {shares} of the squared distances."
            f" Points are up to {float(self.residuals.max()):.3g} from the plane and up to"
            f" {float(self.distances.max()):.3g} from the model."
        )


@dataclass(frozen=True, eq=False)
class TrajectoryPlane:
    """Plane of the largest variance of a run.

    Attributes:
        direction1: Unit direction of the largest variance, (P,), with the data type of the parameters.
        direction2: Unit direction of the second largest variance, orthogonal to the first.
        trajectory: Projection of the run onto this plane.
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
    r"""Compute the principal plane of :math:`\theta_t - \theta` through the current weights :math:`\theta`.

    As in Li et al., the differences are not centered, so that the model is the origin of the plane. Only trainable
    parameters are used. If buffers, such as batch norm statistics, change along the run, the plane has those of the
    model.

    Args:
        model: The model, usually with the last weights of the run.
        states: State dicts or flat vectors (P,) in the order of the run. `read_states` reads a folder of them.
        params: The parameters that are used. By default all that require a gradient.
        labels: Labels of the states. Defaults to their numbers.

    Returns:
        The directions on the CPU, and the projection of the run.

    Raises:
        ValueError: If a state does not fit.
        NoPlaneError: If there are fewer than two states, or all lie on a line through the model.

    Source:
        Li, Xu, Taylor, Studer and Goldstein, 2018, arXiv 1712.09913, section 7.

    Example:
        >>> import torch
        >>> from moe_heads.analysis import trajectory_plane
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> theta = model.weight.detach().flatten()
        >>> steps = torch.tensor([[4.0, 0.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
        >>> plane = trajectory_plane(model, [theta + step for step in steps])
        >>> bool(plane.trajectory.residuals.max() < 1e-6)
        True
    """
    check_names(labels=labels)
    if not isinstance(states, (list, tuple)):
        raise ValueError(f"states: expected a list of state dicts or flat tensors, got {states!r}.")
    named = trainable_parameters(model, params)
    here = torch.cat([p.detach().cpu().reshape(-1) for p in named.values()])
    if len(states) < 2:
        raise NoPlaneError(f"states: expected at least two, got {len(states)}.")
    if labels is not None and len(labels) != len(states):
        raise ValueError(f"labels: expected one for each of {len(states)} states, got {len(labels)}.")
    flat = [_flat(state, named, number) for number, state in enumerate(states)]
    gram = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for steps in _pieces(flat, here):
        gram.addmm_(steps, steps.T)
    # principal components of the T × T matrix, since a run has far fewer states than parameters
    values, vectors = torch.linalg.eigh(gram)
    if values[-2] <= 1e-12 * values[-1] or values[-1] <= 0:
        raise NoPlaneError("states: expected at least two that are not on a line through the model, got a line.")
    weights = (
        vectors[:, [-1, -2]] / values[[-1, -2]].sqrt()
    )  # (T, 2): coefficients of the states in each unit direction
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
    """Read the state dicts in a folder of checkpoints, by file name, in the order of their steps.

    A file has a state dict, or a mapping with a "state_dict" as written by Lightning. Files of Lightning are ordered by
    their "global_step", other files by the numbers in their names. Of several files with the same step one is used.

    Args:
        folder: The folder.
        pattern: Pattern of the file names.

    Raises:
        ValueError: If no file matches.
    """
    files = sorted(Path(folder).glob(pattern), key=_numbers_in)
    if not files:
        raise ValueError(f"folder: expected files {pattern!r}, got none in {folder}.")
    found: list[tuple[float, str, Mapping[str, Tensor]]] = []
    for order, path in enumerate(files):
        content: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        step = float(content.get("global_step", order))
        if "global_step" not in content or step not in [known for known, _, _ in found]:
            found.append((step, path.name, content.get("state_dict", content)))
    return {name: state for _, name, state in sorted(found, key=lambda entry: entry[0])}


class WeightHistory:
    """Parameters at several moments of a run, by name, on the CPU.

    They are stored by name, since layers may be frozen, unfrozen, added and replaced during the run. A parameter that
    has not changed since the previous moment is not copied again.

    Args:
        params: Names of the parameters or modules to store, or None for all.
    """

    def __init__(self, params: Sequence[str] | None) -> None:
        self._params = params
        self._states: dict[str, dict[str, Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._states)

    def record(self, label: str, model: nn.Module) -> None:
        """Store the current weights, unless the model has uninitialized (lazy) parameters."""
        if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
            return
        before: Mapping[str, Tensor] = next(reversed(self._states.values()), {})
        stored = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if self._is_stored(name)}
        self._states[label] = {
            name: _cpu_copy(p.detach(), before.get(name)) for name, p in model.named_parameters() if id(p) in stored
        }

    def common_parameters(self, model: nn.Module) -> list[str]:
        """Return the names of the trainable parameters that existed with the same shape at all moments."""
        named = trainable_parameters(model, self._params)
        states = [*self._states.values()]
        return [name for name, p in named.items() if all(name in s and s[name].shape == p.shape for s in states)]

    def omitted_parameters(self, model: nn.Module) -> list[str]:
        """Return the names of the other parameters that have moved."""
        states, current = [*self._states.values()], dict(model.named_parameters())
        omitted = dict.fromkeys(name for state in states for name in state if name not in self.common_parameters(model))
        return [name for name in omitted if not _is_constant(states, name, current.get(name))]

    def plane(self, model: nn.Module) -> TrajectoryPlane:
        """Compute the `trajectory_plane` of the common parameters.

        Raises:
            NoPlaneError: If there are no common parameters, or the weights lie on a line.
        """
        common = self.common_parameters(model)
        if not common:
            raise NoPlaneError("states: expected a trainable parameter that existed at all moments, got none.")
        return trajectory_plane(model, [*self._states.values()], params=common, labels=[*self._states])

    def _is_stored(self, name: str) -> bool:
        return self._params is None or any(name == entry or name.startswith(f"{entry}.") for entry in self._params)


def _cpu_copy(value: Tensor, before: Tensor | None) -> Tensor:
    copy = value.cpu()
    if before is not None and before.dtype == copy.dtype and torch.equal(before, copy):
        return before
    return copy.clone() if copy.data_ptr() == value.data_ptr() else copy


def _is_constant(states: Sequence[Mapping[str, Tensor]], name: str, now: Tensor | None) -> bool:
    if now is None:
        return False
    return all(name in state and torch.equal(state[name], now.detach().cpu()) for state in states)


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
                f"states: expected the model's {missing[0]!r} in each, in its shape, got state {number} without it."
            )
        flat = torch.cat([state[name].detach().cpu().reshape(-1) for name in named])
    if flat.shape != (size,) or not bool(flat.isfinite().all()):
        raise ValueError(f"states: expected ({size},) finite numbers in each, got others in state {number}.")
    return flat.cpu()


def _pieces(flat: Sequence[Tensor], origin: Tensor) -> Iterator[Tensor]:
    """Compute the differences of all states from the origin in double precision, some parameters at a time.

    Yields:
        The next piece, (T, ·).
    """
    for parts in zip(origin.split(_PIECE), *(one.split(_PIECE) for one in flat), strict=True):
        start, *ends = (part.double() for part in parts)
        yield torch.stack(ends) - start

"""The arrays of a landscape in a file that any program with NumPy can read."""

import os
from typing import IO, Any

import numpy as np

from moe_heads.analysis.loss_landscape.measured import MeasuredLandscape
from moe_heads.analysis.loss_landscape.numbers import landscape_metrics

__all__ = ["save_arrays"]

_TENSORS = ("alphas", "betas", "losses", "losses_fixed_routing", "accuracies", "routing_flips")


def save_arrays(result: MeasuredLandscape, file: "str | os.PathLike[str] | IO[bytes]") -> None:
    """Write an ``.npz``: the tensors that are there by their names, ``center_loss``, and every metric as ``metric_…``.

    With a trajectory also ``trajectory_coordinates`` (T, 2), ``trajectory_residuals`` (T,) and ``explained_variance``.

    Args:
        result: The landscape.
        file: Path or open file.
    """
    arrays: dict[str, Any] = {name: getattr(result, name) for name in _TENSORS}
    arrays |= {"center_loss": result.center_loss, "direction_norms": result.direction_norms or None}
    if result.trajectory is not None:
        arrays["trajectory_coordinates"] = result.trajectory.coordinates
        arrays["trajectory_residuals"] = result.trajectory.residuals
        arrays["explained_variance"] = result.trajectory.explained_variance
    arrays |= {f"metric_{name}": value for name, value in landscape_metrics(result).items()}
    there: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items() if value is not None}
    np.savez(file, **there)

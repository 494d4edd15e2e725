"""Eigenvectors as directions of a landscape, and the files of its points and eigenvectors."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_heads.analysis import SharpnessResult
from moe_heads.analysis._shared.batches import LossFn
from moe_heads.analysis._shared.digest import digest_of, digest_of_code
from moe_heads.analysis._shared.parameters import trainable_parameters
from moe_heads.analysis.sharpness.hessian import top_eigenvectors
from moe_heads.callbacks._shared.inputs import AnalysisInputs
from moe_heads.callbacks.sharpness import SharpnessCallback

__all__ = ["points_file", "top_eigenvectors_of"]

# Relative residual at which an eigenvector is accurate enough for a direction, and the largest number of steps.
_TOLERANCE, _MAX_STEPS = 1e-3, 200

# Length of the digest in a file name. Two of a million files collide with a probability below 1e-7.
_NUM_DIGITS = 16

# Methods with which a module may compute its loss and accuracy.
_METHODS = ("analysis_loss", "analysis_accuracy", "training_step", "forward")


def top_eigenvectors_of(
    inputs: AnalysisInputs, number: int, loss_fn: LossFn | None, params: Sequence[str] | None, seed: int
) -> Tensor:
    """Return the first eigenvectors of the Hessian, unit vectors (``number``, P).

    They are taken from a `SharpnessCallback` in the same Trainer that ran on the same weights, samples, loss and
    parameters. If there is none, they are computed.

    Args:
        inputs: Inputs of the analysis.
        number: Number of eigenvectors.
        loss_fn: Option of the callback. That of the sharpness callback has to be the same.
        params: Parameters that move. By default all that require a gradient.
        seed: Seed of the start vector of the Lanczos run.
    """
    names = (*trainable_parameters(inputs.model, params),)
    for callback in inputs.context.analyses:
        is_same_loss = isinstance(callback, SharpnessCallback) and callback.loss_fn == loss_fn
        if is_same_loss and (callback.batch_weight_fn or inputs.context.batch_weight_fn) == inputs.batches.weight_fn:
            found: SharpnessResult | None = callback.result_for(inputs)
            if found is not None and found.parameter_names == names and _is_accurate(found, number):
                assert found.eigenvectors is not None
                return found.eigenvectors[:number]
    return top_eigenvectors(
        inputs.model,
        inputs.loss_fn,
        inputs.batches,
        num_eigenvectors=number,
        params=params,
        tolerance=_TOLERANCE,
        max_steps=_MAX_STEPS,
        seed=seed,
        progress=inputs.progress,
        ranks=inputs.ranks,
    )


def points_file(folder: Path, inputs: AnalysisInputs, part: str, depends_on: Iterable[Any]) -> Path:
    """Return a separate file for each model, sample, number of ranks, code of the loss, and other dependencies.

    So points of different epochs, trainings or options have different files, and an equal run finds its own.

    Args:
        folder: Folder of the callback.
        inputs: Inputs of the analysis, whose key represents the weights and the sample.
        part: Beginning of the file name.
        depends_on: Directions, or what determines them.
    """
    functions = [inputs.loss_fn, *(getattr(inputs.model, name, None) for name in _METHODS)]
    digest = digest_of([inputs.key, inputs.ranks.size, *map(digest_of_code, functions), *depends_on])
    return folder / inputs.split / f"{part}_{digest.hex()[:_NUM_DIGITS]}.npz"


def _is_accurate(found: SharpnessResult, number: int) -> bool:
    if (found.matrix, found.which) != ("hessian", "largest"):
        return False
    if found.eigenvectors is None or len(found.eigenvectors) < number:
        return False
    # more steps would not be taken here either
    used_all_steps = found.engine == "lanczos" and found.num_steps >= _MAX_STEPS
    return max(found.residuals[:number]) <= _TOLERANCE or used_all_steps

"""The eigenvectors that a landscape callback draws along: those of a sharpness callback, or its own."""

from collections.abc import Sequence

from torch import Tensor

from moe_heads.analysis import SharpnessResult
from moe_heads.analysis._shared.batches import LossFn
from moe_heads.analysis._shared.parameters import trainable_parameters
from moe_heads.analysis.sharpness.hessian import top_eigenvectors
from moe_heads.callbacks._shared.inputs import AnalysisInputs
from moe_heads.callbacks.sharpness import SharpnessCallback

__all__ = ["top_eigenvectors_of"]

# Relative residual at which an eigenvector is good enough to be drawn along, and steps after which it is taken anyway.
_TOLERANCE, _MAX_STEPS = 1e-3, 200


def top_eigenvectors_of(
    inputs: AnalysisInputs, number: int, loss_fn: LossFn | None, params: Sequence[str] | None, seed: int
) -> Tensor:
    """The first eigenvectors of the Hessian, unit vectors (``number``, P).

    Those of a `SharpnessCallback` in the same Trainer that ran on the same weights, samples, loss and parameters;
    computed where there is none.

    Args:
        inputs: What is analyzed.
        number: Eigenvectors wanted.
        loss_fn: Option of the callback: that of a sharpness callback has to be the same.
        params: Parameters that move; by default all that require a gradient.
        seed: Of the start of the Lanczos run.
    """
    names = (*trainable_parameters(inputs.model, params),)
    for callback in [] if inputs.trainer is None else inputs.trainer.callbacks:  # type: ignore[attr-defined]
        is_same_loss = isinstance(callback, SharpnessCallback) and callback.loss_fn == loss_fn
        if is_same_loss and callback.batch_weight_fn == inputs.batches.weight_fn:
            found: SharpnessResult | None = callback.result_for(inputs)
            if found is not None and found.parameter_names == names and _is_enough(found, number):
                assert found.eigenvectors is not None
                return found.eigenvectors[:number]
    assert inputs.loss_fn is not None
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


def _is_enough(found: SharpnessResult, number: int) -> bool:
    if found.eigenvectors is None or len(found.eigenvectors) < number:
        return False
    # more steps than that would not be taken here either
    has_tried = found.engine == "lanczos" and found.num_steps >= _MAX_STEPS
    return max(found.residuals[:number]) <= _TOLERANCE or has_tried

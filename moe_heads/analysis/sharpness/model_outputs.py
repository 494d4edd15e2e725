"""Outputs of a model and the loss of these, given by the user, by methods of the model, or by Hugging Face."""

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.copies import on_copies
from moe_heads.analysis._shared.environment import device_of
from moe_heads.analysis._shared.graph_on_demand import GraphOnDemand
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis._shared.scalar import is_scalar
from moe_heads.analysis._shared.shards import is_sharded
from moe_heads.analysis.sharpness.hessian.output_loss import OutputLoss, OutputLossFn, OutputsFn
from moe_heads.analysis.sharpness.hessian.products import Matrix

__all__ = ["check_matrix", "check_same_loss", "output_loss_of"]

# Relative and absolute difference of two losses that rounding explains, in units of the resolution of the data type.
_RELATIVE, _ABSOLUTE = 1000, 100

_REMEDY = (
    "A scalar loss_fn does not define the Gauss-Newton matrix. Pass outputs_fn(model, batch) -> outputs and"
    " output_loss(outputs, batch) -> scalar, or give the module the methods analysis_outputs(batch) and"
    " analysis_output_loss(outputs, batch)."
)


def check_matrix(matrix: Matrix, outputs_fn: OutputsFn | None, output_loss: OutputLossFn | None) -> None:
    """Check the functions that define a matrix, as far as they do not depend on the model.

    Raises:
        ValueError: If one of the two is missing, or both belong to another matrix.
    """
    given: dict[str, Any] = {"outputs_fn": outputs_fn, "output_loss": output_loss}
    for name, function in given.items():
        if function is None:
            continue
        if not callable(function):
            raise ValueError(f"{name}: expected a function or None, got {function!r}.")
        if matrix == "hessian":
            raise ValueError(
                f'{name}: expected None with matrix="hessian", got {function!r}. Pass matrix="gauss_newton".'
            )
    missing = [name for name, function in given.items() if function is None]
    if len(missing) == 1:
        raise ValueError(f"{missing[0]}: expected a function, got None. {_REMEDY}")


def output_loss_of(
    model: nn.Module, loss_fn: LossFn, outputs_fn: OutputsFn | None, output_loss: OutputLossFn | None
) -> OutputLoss:
    """Return the loss as a function of the outputs, in this order of preference.

    1. The two given functions; 2. ``loss_fn``, if it is an `OutputLoss`; 3. the model's own methods
    ``analysis_outputs(batch)`` and ``analysis_output_loss(outputs, batch)``; 4. logits and ``loss_function`` of a
    Hugging Face model.

    Raises:
        ValueError: If there is none, or the model is sharded.
    """
    if is_sharded(model):
        raise ValueError(
            'matrix: expected "hessian" for a sharded model, got "gauss_newton". Analyze a copy that is not sharded.'
        )
    if outputs_fn is not None and output_loss is not None:
        return OutputLoss(outputs_fn, output_loss)
    if isinstance(loss_fn, OutputLoss):
        return loss_fn
    if hasattr(model, "analysis_outputs") and hasattr(model, "analysis_output_loss"):
        own = cast(Any, model)
        return OutputLoss(
            lambda model, batch: cast(Any, model).analysis_outputs(batch),
            lambda outputs, batch: own.analysis_output_loss(outputs, batch),
        )
    found = _of_hugging_face(model)
    if found is None:
        raise ValueError(f"outputs_fn: expected a function, got None. {_REMEDY}")
    return found


def check_same_loss(
    model: nn.Module, loss_fn: LossFn, parts: OutputLoss, data: Batches, progress: Progress, seed: int
) -> None:
    """Check on every batch that the loss of the outputs is the loss itself.

    Two forward passes over the data. When the time of the progress is over, the rest of the batches is not compared.

    Args:
        model: The model.
        loss_fn: The loss.
        parts: The loss of the outputs.
        data: The batches.
        progress: Checked before each batch.
        seed: Seed of torch's random numbers in every evaluation.

    Raises:
        ValueError: If the two differ by more than rounding.
    """
    if parts is loss_fn:
        return
    graph = GraphOnDemand()

    def losses(index: int, batch: Batch) -> list[Tensor]:
        found = []
        for each in (loss_fn, parts):
            torch.manual_seed(seed)
            found.append(graph(lambda each=each: on_copies(each)(model, batch)))  # type: ignore[misc]
        return found

    with analysis_mode(model, seed):
        try:
            for index, (_, found) in enumerate(Microbatches(data, device_of(model), progress).evaluate(losses)):
                _check_equal(index, *found)
        except TimeUp:
            return


def _check_equal(index: int, expected: Tensor, found: Tensor) -> None:
    if not is_scalar(found):
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"output_loss: expected a scalar tensor, the mean loss of batch {index}, got {got}.")
    if not is_scalar(expected):
        return  # the analysis itself raises an error
    one, other = float(expected.detach()), float(found.detach())
    resolution = max(torch.finfo(loss.dtype).eps for loss in (expected, found))
    if not abs(one - other) <= _RELATIVE * resolution * max(abs(one), abs(other)) + _ABSOLUTE * resolution:
        raise ValueError(
            f"output_loss: expected the loss of loss_fn, {one:.8g} for batch {index}, got {other:.8g}. The"
            " Gauss-Newton matrix is that of the loss only if output_loss(outputs_fn(model, batch), batch) equals"
            " loss_fn(model, batch)."
        )


def _of_hugging_face(model: nn.Module) -> OutputLoss | None:
    """Return logits and the loss function of a Hugging Face model, or None for another model."""
    config, function = getattr(model, "config", None), getattr(model, "loss_function", None)
    if config is None or not callable(function):
        return None
    values: dict[str, Any] = {"config": config, "vocab_size": getattr(config, "vocab_size", None)}
    if hasattr(config, "get_text_config"):
        values["vocab_size"] = getattr(config.get_text_config(), "vocab_size", None)
    needed = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    ]
    logits = next((name for name in ("logits", "pooled_logits") if name in needed), None)
    if logits is None or "labels" not in needed or not set(needed) <= {logits, "labels", *values}:
        return None
    others = {name: values[name] for name in needed if name in values}
    takes_labels = bool(getattr(config, "is_encoder_decoder", False))  # its decoder takes them as inputs

    def outputs_fn(model: nn.Module, batch: Batch) -> Any:
        inputs = {name: value for name, value in _mapping(batch).items() if takes_labels or name != "labels"}
        return model(**inputs, return_dict=True).logits

    def output_loss(outputs: Tensor, batch: Batch) -> Any:
        return function(**{logits: outputs, "labels": _mapping(batch)["labels"]}, **others)

    return OutputLoss(outputs_fn, output_loss)


def _mapping(batch: Batch) -> Mapping[str, Any]:
    if isinstance(batch, Mapping) and "labels" in batch:
        return batch
    got = f"one with {sorted(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(
        f'batches: expected mappings with the key "labels" for a Hugging Face model, got {got}. Pass outputs_fn and'
        " output_loss."
    )

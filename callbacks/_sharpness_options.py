"""Checks of the options of the sharpness callback."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from moe_heads.analysis._shared.names import check_names
from moe_heads.analysis._shared.parameters import check_real
from moe_heads.analysis.sharpness.hessian.lanczos import check_basis_memory
from moe_heads.analysis.sharpness.hessian.parameters import check_types, selected_parameters
from moe_heads.analysis.sharpness.result import Engine
from moe_heads.checks import check_option

__all__ = ["check_are_in", "check_differentiable", "check_engine", "check_memory", "check_params"]

# Options that engine="pyhessian" uses. It has its own tolerances, and computes no blocks.
_OF_PYHESSIAN = {"num_eigenvalues", "density"}


def check_engine(engine: Any, options: Mapping[str, Any], defaults: Mapping[str, inspect.Parameter]) -> None:
    """Check that the engine supports the options.

    Args:
        engine: Option of `SharpnessCallback`.
        options: Other options of `SharpnessCallback` by name.
        defaults: Parameters of `SharpnessCallback`.

    Raises:
        ValueError: If the engine is unknown, or would ignore an option that differs from its default.
    """
    check_option("engine", engine, get_args(Engine))
    for name, value in options.items() if engine == "pyhessian" else ():
        if name not in _OF_PYHESSIAN and value != defaults[name].default:
            raise ValueError(
                f"{name}: expected its default with engine='pyhessian', got {value!r}. Use engine='lanczos'."
            )


def check_are_in(model: nn.Module, params: Iterable[str] | None, blocks: Mapping[str, Iterable[str]] | None) -> None:
    """Check that names belong to a parameter or a module; `check_differentiable` checks their types later.

    Raises:
        ValueError: If a name is unknown.
    """
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, module in model.named_modules() if any(True for _ in module.parameters())}
    given = {"params": params or (), **{f"blocks[{block!r}]": members for block, members in (blocks or {}).items()}}
    for option, names in given.items():
        for name in names:
            if name not in known:
                some = ", ".join(repr(other) for other in sorted(known - {""}, key=lambda other: other.count("."))[:5])
                raise ValueError(f"{option}: expected names of parameters or modules, such as {some}, got {name!r}.")


def check_differentiable(
    owner: str, model: nn.Module, params: Iterable[str] | None, *, only_real: bool = False
) -> None:
    """Check before training that the curvature is defined for the types of all parameters.

    Args:
        owner: Name of the callback.
        model: The model as it is trained, in the precision of the Trainer.
        params: Option of the callback.
        only_real: Whether to check for complex parameters only.

    Raises:
        MisconfigurationException: If a parameter has an unsupported type.
    """
    chosen = {
        name: p
        for name, p in model.named_parameters(remove_duplicate=False)
        if p.requires_grad
        and not isinstance(p, nn.UninitializedParameter)
        and (params is None or any(name == meant or name.startswith(f"{meant}.") for meant in params))
    }
    if not chosen:
        return  # parameters may be unfrozen later
    try:
        check_real(chosen)
        if not only_real:
            check_types(chosen)
    except ValueError as error:
        raise MisconfigurationException(f"{owner}: {error}") from error


def check_memory(
    owner: str, model: nn.Module, params: Sequence[str] | None, basis_memory: int | None, num_eigenvalues: int
) -> None:
    """Check before training that the vectors of the Krylov space have room.

    Args:
        owner: Name of the callback.
        model: The model.
        params: Option of the callback.
        basis_memory: Likewise.
        num_eigenvalues: Likewise.

    Raises:
        ValueError: If there is room for fewer eigenvalues only.
        MisconfigurationException: If there is room for none.
    """
    try:
        selected = list(selected_parameters(model, params).values())
    except ValueError:
        return  # a model that cannot be analyzed yet raises an error when the analysis begins
    size, first = sum(p.numel() for p in selected), selected[0]
    if basis_memory is None and first.device.type not in {"cpu", "cuda"}:
        return  # the free memory is unknown
    try:
        check_basis_memory(basis_memory, size, first.dtype, first.device, min(num_eigenvalues, size))
    except MemoryError as error:
        raise MisconfigurationException(f"{owner}: {error}") from error


def check_params(params: Any) -> None:
    """Raise a ValueError unless ``params`` is None or a list of at least one name."""
    check_names(params=params)
    if params is not None and not params:
        raise ValueError(f"params: expected at least one name of a parameter or module, got {params!r}.")

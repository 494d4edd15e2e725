"""Checks of the options of the sharpness callback."""

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from moe_heads.analysis._shared.parameters import check_real
from moe_heads.analysis.sharpness.hessian.parameters import check_types
from moe_heads.analysis.sharpness.result import Engine
from moe_heads.checks import check_flags, check_option, check_positive

__all__ = ["check_differentiable", "check_list_of_names", "check_names", "check_report_options"]


def check_report_options(flags: Mapping[str, Any], params: Any, blocks: Any, routing_steps: Any, engine: Any) -> None:
    """Check the types of options, and that the engine supports them.

    Args:
        flags: Boolean options by name.
        params: Option of `SharpnessCallback`.
        blocks: Option of `SharpnessCallback`.
        routing_steps: Option of `SharpnessCallback`.
        engine: Option of `SharpnessCallback`.

    Raises:
        ValueError: If an option is invalid.
    """
    check_flags(**flags)
    if params is not None:
        check_list_of_names("params", params)
    if blocks is not None:
        if not isinstance(blocks, Mapping) or not blocks or not all(isinstance(block, str) for block in blocks):
            raise ValueError(f"blocks: expected a mapping from names of blocks to lists of names, got {blocks!r}.")
        for block, members in blocks.items():
            check_list_of_names(f"blocks[{block!r}]", members)
    if not isinstance(routing_steps, (list, tuple)):
        raise ValueError(f"routing_steps: expected a list of finite numbers above 0, got {routing_steps!r}.")
    check_positive(**{f"routing_steps[{place}]": step for place, step in enumerate(routing_steps)})
    if len(set(routing_steps)) < len(routing_steps):
        raise ValueError(f"routing_steps: expected distinct numbers, got {routing_steps!r}.")
    check_option("engine", engine, get_args(Engine))
    if engine == "pyhessian":
        unsupported = {
            "blocks": blocks,
            "block_eigenvalues": flags["block_eigenvalues"],
            "perturbation": flags["perturbation"],
        }
        for name, value in unsupported.items():
            if value:
                raise ValueError(
                    f"{name}: expected its default with engine='pyhessian', got {value!r}. Use engine='lanczos'."
                )


def check_names(model: nn.Module, params: Iterable[str] | None, blocks: Mapping[str, Iterable[str]] | None) -> None:
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


def check_list_of_names(option: str, names: Any) -> None:
    """Raise an error unless ``names`` is a nonempty list of names."""
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{option}: expected a list of names of parameters or modules, got {names!r}.")

"""What is refused of the options of the sharpness callback, before any work starts."""

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
    """Refuse options of a wrong kind, and those that the engine would leave out.

    Args:
        flags: Options that are true or false, by name.
        params: Option of `SharpnessCallback`, as are the others.
        blocks: The same.
        routing_steps: The same.
        engine: The same.

    Raises:
        ValueError: Names the option, what was expected and what came.
    """
    check_flags(**flags)
    if params is not None:
        check_list_of_names("params", params)
    if blocks is not None:
        if not isinstance(blocks, Mapping) or not blocks or not all(isinstance(block, str) for block in blocks):
            raise ValueError(f"blocks: expected lists of names by the name of the block, got {blocks!r}")
        for block, members in blocks.items():
            check_list_of_names(f"blocks[{block!r}]", members)
    if not isinstance(routing_steps, (list, tuple)):
        raise ValueError(f"routing_steps: expected a list of finite numbers above 0, got {routing_steps!r}")
    check_positive(**{f"routing_steps[{place}]": step for place, step in enumerate(routing_steps)})
    if len(set(routing_steps)) < len(routing_steps):
        raise ValueError(f"routing_steps: expected different numbers, got {routing_steps!r}")
    check_option("engine", engine, get_args(Engine))
    if engine == "pyhessian":
        asked = {
            "blocks": blocks,
            "block_eigenvalues": flags["block_eigenvalues"],
            "perturbation": flags["perturbation"],
        }
        for name, value in asked.items():
            if value:
                raise ValueError(
                    f"{name}: expected its default with engine='pyhessian', which does without, got {value!r}"
                )


def check_names(model: nn.Module, params: Iterable[str] | None, blocks: Mapping[str, Iterable[str]] | None) -> None:
    """Refuse names that are none of a parameter or a module; whether these can be differentiated is seen later.

    Raises:
        ValueError: Names the option and what came.
    """
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, module in model.named_modules() if any(True for _ in module.parameters())}
    asked = {"params": params or (), **{f"blocks[{block!r}]": members for block, members in (blocks or {}).items()}}
    for option, names in asked.items():
        for name in names:
            if name not in known:
                some = ", ".join(repr(other) for other in sorted(known - {""}, key=lambda other: other.count("."))[:5])
                raise ValueError(f"{option}: expected names of parameters or modules, such as {some}, got {name!r}")


def check_differentiable(
    owner: str, model: nn.Module, params: Iterable[str] | None, *, only_real: bool = False
) -> None:
    """Refuse parameters whose types no curvature can be computed for, before training.

    Args:
        owner: The callback.
        model: The model as it is trained, in the precision of the Trainer.
        params: Option of the callback.
        only_real: Refuse complex parameters alone.

    Raises:
        MisconfigurationException: Names what was found, and the remedy.
    """
    chosen = {
        name: p
        for name, p in model.named_parameters(remove_duplicate=False)
        if p.requires_grad
        and not isinstance(p, nn.UninitializedParameter)
        and (params is None or any(name == meant or name.startswith(f"{meant}.") for meant in params))
    }
    if not chosen:
        return  # what is to be trained may be unfrozen later
    try:
        check_real(chosen)
        if not only_real:
            check_types(chosen)
    except ValueError as error:
        raise MisconfigurationException(f"{owner}: {error}") from error


def check_list_of_names(option: str, names: Any) -> None:
    """Refuse anything but a list of names."""
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{option}: expected a list of names of parameters or modules, got {names!r}")

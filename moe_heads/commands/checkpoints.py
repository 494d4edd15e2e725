"""Models from checkpoints."""

import inspect
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.digest import digest_of
from moe_heads.commands.digests import digest_of_file, digest_of_weights
from moe_heads.commands.errors import CommandError, one_sentence
from moe_heads.commands.import_names import import_object

__all__ = ["LoadedModel", "load_model"]

# Most names of tensors in a message.
_MOST_NAMES = 4


@dataclass(frozen=True)
class LoadedModel:
    """A model with the weights of a checkpoint.

    Attributes:
        model: The model, on the CPU.
        checkpoint: Absolute path of the checkpoint.
        checkpoint_digest: SHA-256 digest of the file.
        weights_digest: SHA-256 digest of the state dict.
        unpickled: Classes and functions outside torch's list of safe ones that were loaded from the file.
    """

    model: nn.Module
    checkpoint: str
    checkpoint_digest: str
    weights_digest: str
    unpickled: tuple[str, ...]


def load_model(name: str, path: Path, *, unpickle: bool = False) -> LoadedModel:
    """Build a model and load a checkpoint into it.

    Args:
        name: Import name of a class with ``load_from_checkpoint``, or of a function that returns a module for a state
            dict. If the function does not load the state dict itself, it is loaded here.
        path: The checkpoint.
        unpickle: Whether to load objects other than tensors and plain data, which can run any code.

    Raises:
        CommandError: If the file cannot be loaded, or does not fit the model.
    """
    if not path.is_file():
        got = "is a folder" if path.is_dir() else "does not exist"
        raise CommandError(f"--ckpt: expected a file, got {str(path)!r}, which {got}.")
    maker = import_object("--model", name)
    content = _read(path, unpickle=unpickle)
    if inspect.isclass(maker) and hasattr(maker, "load_from_checkpoint"):
        model = _by_class(name, maker, path, unpickle=unpickle)
    elif callable(maker) and not inspect.isclass(maker) and not isinstance(maker, nn.Module):
        model = _by_function(name, maker, _state_dict(content))
    else:
        raise CommandError(
            "--model: expected a class with load_from_checkpoint, or a function that returns a module for a state dict,"
            f" got {name} = {maker!r}."
        )
    unpickled = tuple(torch.serialization.get_unsafe_globals_in_checkpoint(path)) if unpickle else ()
    return LoadedModel(model, str(path.resolve()), digest_of_file(path), digest_of_weights(model), unpickled)


def _read(path: Path, *, unpickle: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=not unpickle)
    except pickle.UnpicklingError as error:
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # of any kind: the file is no checkpoint, which the error below says
            unsafe = []
        if not unsafe:
            raise CommandError(f"--ckpt: expected a checkpoint of torch, got {str(path)!r}, which is none.") from error
        raise CommandError(
            f"--ckpt: expected tensors and plain data, got {str(path)!r} with {', '.join(unsafe)}, which loading would"
            " run as code: add --unpickle if you trust the file."
        ) from error
    except Exception as error:
        raise CommandError(
            f"--ckpt: expected a checkpoint of torch, got {str(path)!r}, which failed with {type(error).__name__}:"
            f" {one_sentence(error)}"
        ) from error


def _by_class(name: str, maker: Any, path: Path, *, unpickle: bool) -> nn.Module:
    options: dict[str, Any] = {"map_location": "cpu"}
    if "weights_only" in inspect.signature(maker.load_from_checkpoint).parameters:
        options["weights_only"] = not unpickle
    try:
        model = maker.load_from_checkpoint(path, **options)
    except Exception as error:
        raise CommandError(
            f"--model: expected a checkpoint of {name}, got {str(path)!r}, which does not fit:"
            f" {type(error).__name__}: {one_sentence(error)}"
        ) from error
    return _checked(name, model)


def _by_function(name: str, maker: Callable[..., Any], state: dict[str, Tensor]) -> nn.Module:
    try:
        model = maker(dict(state))
    except Exception as error:
        raise CommandError(
            f"--model: expected {name} to return a module for the state dict, got {type(error).__name__}:"
            f" {one_sentence(error)}"
        ) from error
    model = _checked(name, model)
    own = model.state_dict()
    saved = {digest_of([tensor]) for tensor in state.values()}
    if all(digest_of([tensor]) in saved for tensor in own.values() if isinstance(tensor, Tensor)):
        return model  # the function has loaded the weights, possibly under other names
    misfit = _misfit(own, state)
    if misfit:
        raise CommandError(f"--model: expected a checkpoint of {name}, got one of another model: {misfit}.")
    model.load_state_dict(state)
    return model


def _checked(name: str, model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise CommandError(f"--model: expected {name} to return a torch.nn.Module, got {type(model).__name__}.")
    return model


def _state_dict(content: Any) -> dict[str, Tensor]:
    found = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        raise CommandError(
            "--ckpt: expected a state dict, or a mapping with the entry 'state_dict', got"
            f" {type(content).__name__} without tensors."
        )
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def _misfit(own: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Return the keys and shapes of a state dict that do not fit a model, or ""."""
    parts = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
            for key, tensor in own.items()
            if key in state and isinstance(tensor, Tensor) and tensor.shape != state[key].shape
        ],
    }
    return "; ".join(f"{kind}: {_listed(names)}" for kind, names in parts.items() if names)


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + rest

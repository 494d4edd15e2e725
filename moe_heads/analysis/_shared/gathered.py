"""A part of a sharded model as a plain model in each process, with recorded outputs in place of the rest."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import Batch
from moe_heads.analysis._shared.copies import own_copy
from moe_heads.analysis._shared.forwards import intercepted
from moe_heads.analysis._shared.in_step import in_step, work_in_step
from moe_heads.analysis._shared.parameters import Selection, trainable_parameters
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.scalar import is_scalar
from moe_heads.analysis._shared.shards import REMEDY, full, reshard

__all__ = ["Gathered", "Quantity", "gathered"]

Quantity = Callable[[nn.Module, Batch], Tensor]
"""``quantity(model, batch)``, such as a loss or an accuracy."""

# Relative change of a loss by another order of a sum in single precision.
_ROUNDING = 1e-5

_Records = dict[str, tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class Gathered:
    """A part of a sharded model that each process holds as a whole.

    Attributes:
        model: Model with the selected parameters as plain ones. The modules that run before them return what they
            returned when they were recorded. It can be differentiated, moved and copied without other processes.
        data: The batches, each with the recorded outputs. For this model and its quantities only.
        quantities: The given functions, to be called with this model and its batches.
    """

    model: nn.Module
    data: Batches
    quantities: tuple[Quantity, ...]


def gathered(
    model: nn.Module,
    quantities: Sequence[Quantity],
    data: Batches,
    params: Selection,
    *,
    ranks: Ranks,
    progress: Progress,
    seed: int,
) -> Gathered:
    """Gather the selected parameters of a sharded model, and record the outputs of the other modules.

    Modules with parameters that run before the selected ones are recorded, once for each batch. Those that run
    after them are gathered too, and frozen. Each process needs memory for these parameters and outputs. All processes
    call this, with the same number of batches.

    Args:
        model: The model.
        quantities: Functions of the model and a batch, such as the loss.
        data: The batches of this process.
        params: The selected parameters.
        ranks: The processes.
        progress: Checked before each batch.
        seed: Seed of torch's random numbers in the first batch. It increases by one with each batch.
    """
    work_in_step(model, data, ranks)
    chosen = [*trainable_parameters(model, params)]
    recorder = _Recorder(model, {name.rpartition(".")[0] for name in chosen})
    watched = in_step(model, progress, ranks)
    records: list[tuple[_Records, ...]] = []
    values: list[float] = []
    with ranks.synchronized(), analysis_mode(model, seed), torch.no_grad():
        for index, batch in enumerate(data):
            watched.tick()
            found = []
            for quantity in quantities:
                torch.manual_seed(seed + index)
                with recorder.recording() as calls:
                    value = quantity(model, own_copy(batch))
                found.append(calls)
                values += [float(value)] if index == 0 and is_scalar(value) else []
            records.append(tuple(found))
        reshard(model)
        plain = _Copies(model, chosen, recorder)
        whole = plain.of("", model)
    items = list(zip(data, records, strict=True))
    weight_fn = data.weight_fn
    batches = Batches(
        items,
        data.sizes,
        weight_fn=None if weight_fn is None else lambda item: weight_fn(item[0]),
    )
    part = Gathered(whole, batches, tuple(plain.replayed(q, place) for place, q in enumerate(quantities)))
    with ranks.synchronized(), analysis_mode(whole, seed), torch.no_grad():
        for quantity, before in zip(part.quantities, values, strict=False):
            torch.manual_seed(seed)
            plain.check(float(quantity(whole, own_copy(items[0]))), before)
    return part


class _Recorder:
    """Records the outputs of the modules outside of the selected part.

    Args:
        model: The model.
        owners: Names of the modules that hold selected parameters.

    Attributes:
        paths: Names of the owners and of all modules that contain them.
        outside: The largest modules with parameters that contain none of them, by name.
        later: Names of those that ran after an owner.
    """

    def __init__(self, model: nn.Module, owners: set[str]) -> None:
        parts = [owner.split(".") for owner in owners]
        self.paths = {".".join(names[:depth]) for names in parts for depth in range(len(names) + 1)}
        self._owners = [module for name, module in model.named_modules() if name in owners and name]
        self.outside: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            is_below = name.rpartition(".")[0] in self.paths
            if name not in self.paths and is_below and any(True for _ in module.parameters()):
                self.outside[name] = module
        self._names = {module: name for name, module in self.outside.items()}
        self.later: set[str] = set()

    @contextmanager
    def recording(self) -> Iterator[_Records]:
        """Record the calls inside the block.

        Yields:
            The outputs of each module, in the order of its calls; complete at the end of the block.
        """
        calls: _Records = {}
        has_run = False

        def called(
            module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            nonlocal has_run
            if module not in self._names:
                has_run = True
                return forward(*args, **kwargs)
            output = forward(*args, **kwargs)
            name = self._names[module]
            if has_run:
                self.later.add(name)
            kept = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output)
            calls[name] = (*calls.get(name, ()), kept)
            return output

        with intercepted([*self._owners, *self.outside.values()], called):
            yield calls


class _Copies:
    """Plain copies of the modules of a sharded model.

    Args:
        model: The model.
        chosen: Names of the parameters that stay trainable.
        recorder: The modules that are replaced by their recorded outputs.
    """

    def __init__(self, model: nn.Module, chosen: Sequence[str], recorder: _Recorder) -> None:
        named = dict(model.named_parameters())
        self._trainable = {id(named[name]) for name in chosen}
        self._recorder = recorder
        self._recorded: dict[str, _Recorded] = {}
        self._params: dict[int, nn.Parameter] = {}
        self._modules: dict[int, nn.Module] = {}

    def of(self, name: str, module: nn.Module) -> nn.Module:
        """Return the copy of a module. A module without parameters inside is returned itself."""
        if id(module) in self._modules:
            return self._modules[id(module)]
        copied: nn.Module = module
        if name in self._recorder.outside and name not in self._recorder.later:
            copied = self._recorded[name] = _Recorded(name, module)
        elif any(True for _ in module.parameters()):
            copied = _unsharded(module)
            for key, parameter in module._parameters.items():
                copied._parameters[key] = None if parameter is None else self._whole(parameter)
            for key, child in module._modules.items():
                inner = f"{name}.{key}" if name else key
                copied._modules[key] = None if child is None else self.of(inner, child)
        self._modules[id(module)] = copied
        return copied

    def replayed(self, quantity: Quantity, place: int) -> Quantity:
        """Return a quantity of the copy, whose batches are pairs of a batch and its records."""

        def replay(model: nn.Module, item: Any) -> Tensor:
            batch, records = item
            for name, module in self._recorded.items():
                module.outputs = list(records[place].get(name, ()))
            return quantity(model, batch)

        return replay

    def check(self, value: float, before: float) -> None:
        """Check a value of the copy.

        Args:
            value: The value, from the last call of a quantity.
            before: The same value of the sharded model.

        Raises:
            RuntimeError: If it differs, or if the recorded outputs were not used.
        """
        unused = [name for name, module in self._recorded.items() if module.outputs]
        if unused:
            raise RuntimeError(
                f"loss_fn: expected a function that evaluates the model it is given, got one that did not run"
                f" {unused[0]!r} of it. Use the argument in place of a model from outside."
            )
        if abs(value - before) > _ROUNDING * max(abs(value), abs(before)):
            raise RuntimeError(
                f"params: expected the same value of the gathered part, {before:.8g}, got {value:.8g}. The model has a"
                f" state that is not in its parameters. {REMEDY}."
            )

    def _whole(self, parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) not in self._params:
            whole = full(parameter).clone()
            self._params[id(parameter)] = nn.Parameter(whole, requires_grad=id(parameter) in self._trainable)
        return self._params[id(parameter)]


class _Recorded(nn.Module):
    """A module that returns recorded outputs, one for each call.

    Args:
        name: Name of the recorded module.
        module: The recorded module.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self._recorded_name, self._kind = name, type(module).__name__
        self.outputs: list[Any] = []

    @override
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"{self._recorded_name!r} is sharded, and only the output of its forward pass was recorded. The loss"
                f" uses its attribute {name!r}. Add the module to params."
            ) from None

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        depends = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs)))
        if depends or not self.outputs:
            reason = (
                "its input depends on the selected parameters" if depends else "it is called more often than before"
            )
            raise RuntimeError(
                f"{self._recorded_name!r} ({self._kind}) is sharded, and its recorded output does not apply: {reason}."
                " Add the module to params."
            )
        return self.outputs.pop(0)


def _unsharded(module: nn.Module) -> nn.Module:
    """Return a shallow copy of a module with containers of its own, without the class and the hooks of FSDP2."""
    from torch.distributed.fsdp import FSDPModule

    kind = next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
    copied = cast(nn.Module, object.__new__(kind))
    own = {key: value for key, value in vars(module).items() if not key.startswith("__composable_api")}
    for key, value in own.items():
        if isinstance(value, OrderedDict) and "_hooks" in key:
            own[key] = OrderedDict((number, hook) for number, hook in value.items() if not _is_of_torch(hook))
    containers = {key: dict(own[key]) for key in ("_parameters", "_modules")}
    buffers = {key: None if buffer is None else buffer.clone() for key, buffer in own["_buffers"].items()}
    vars(copied).update(own | containers | {"_buffers": buffers})
    return copied


def _is_of_torch(hook: object) -> bool:
    return type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.")

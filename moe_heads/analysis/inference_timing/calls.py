"""Functions with recorded arguments, the modes in which they run, and batches of any size."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from moe_heads.analysis._shared.batches import Batch, leaves_of, map_leaves

__all__ = [
    "MODEL",
    "Call",
    "ModeUnavailableError",
    "RowKey",
    "TimingMode",
    "check_resizable",
    "in_mode",
    "num_samples",
    "resized",
]

MODEL = "model"
"""Name of the rows of the whole model."""

TimingMode = Literal["eager", "compiled", "cuda_graph", "bf16", "channels_last"]
"""Execution mode: plain eager, torch.compile, a CUDA graph, bf16 autocast, or the channels_last memory format."""

_COMPILED = itertools.count()
# torch requires warm-up runs on a side stream before it captures a graph
_RUNS_BEFORE_CAPTURE = 3


class RowKey(NamedTuple):
    """Name and mode of a timed call."""

    module: str
    mode: TimingMode = "eager"


class ModeUnavailableError(ValueError):
    """Error for a mode that does not apply to a module or device."""


@dataclass(frozen=True)
class Call:
    """A function with its recorded arguments; calling the object runs the function once for each of them.

    Attributes:
        function: A module, a function that receives one, or a stage of a head, which needs no arguments.
        arguments: Positional and keyword arguments of each run within a forward pass.
        overwritten: Original values of the tensors that the function modifies in place, by index among the leaves.
    """

    function: Callable[..., object]
    arguments: tuple[tuple[Sequence[Any], Mapping[str, Any]], ...] = (((), {}),)
    overwritten: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def inputs(self) -> list[Tensor]:
        """The first tensor of each run."""
        return [next(leaf for leaf in leaves_of(run) if isinstance(leaf, Tensor)) for run in self.arguments]

    @property
    def is_stage(self) -> bool:
        """True for a stage of a head, which needs no arguments."""
        return not any(args or kwargs for args, kwargs in self.arguments)

    def __call__(self) -> object:
        """Run the function; containers are copied first because the function may remove entries from them."""
        output = None
        for args, kwargs in self.arguments:
            if not all(isinstance(arg, (Tensor, nn.Module)) for arg in (*args, *kwargs.values())):
                args, kwargs = map_leaves((args, kwargs), lambda leaf: leaf)
            output = self.function(*args, **kwargs)
        return output

    def restore_inputs(self) -> None:
        """Restore the tensors that the function modifies to their values before the first run."""
        if self.overwritten:
            leaves = leaves_of(self.arguments)
            for index, original in self.overwritten.items():
                leaves[index].copy_(original)


def in_mode(mode: TimingMode, call: Call, device: torch.device) -> Callable[[], object]:
    """Compile, capture or convert a call for a mode, without any change to the user's model.

    "bf16" enters autocast in each run, as a server does. "channels_last" converts a copy of the weights and the inputs
    once. "compiled" compiles for these shapes only.

    Raises:
        ModeUnavailableError: If the mode does not apply. Errors of the compiler and of the graph capture propagate.
    """
    if mode == "compiled":
        return _compiled(call)
    if mode == "cuda_graph":
        return _cuda_graph(call, device)
    if mode == "channels_last":
        return _channels_last(call)
    return _bf16(call, device) if mode == "bf16" else call


def _bf16(call: Call, device: torch.device) -> Callable[[], object]:
    def run() -> object:
        with torch.autocast(device.type, torch.bfloat16):
            return call()

    return run


def _compiled(call: Call) -> Callable[[], object]:
    function, arguments = call.function, call.arguments

    def run(*args: Any, **kwargs: Any) -> object:
        return function(*args, **kwargs)

    def run_all(*runs: tuple[Sequence[Any], Mapping[str, Any]]) -> None:
        for args, kwargs in runs:
            function(*args, **kwargs)

    if len(arguments) > 1:
        run, arguments = run_all, ((arguments, {}),)  # one program for all runs
    # torch caches compiled programs per code object. With its own code object, a program is freed together with the
    # call, the user's programs stay, and no number of batch sizes reaches the recompilation limit.
    code = run.__code__.replace(co_name=f"timed_{next(_COMPILED)}")
    own = FunctionType(code, run.__globals__, code.co_name, closure=run.__closure__)
    compiled = replace(call, function=torch.compile(own, dynamic=False), arguments=arguments)
    compiled()
    compiled.restore_inputs()
    return compiled


def _cuda_graph(call: Call, device: torch.device) -> Callable[[], object]:
    if device.type != "cuda":
        raise ModeUnavailableError(f"needs a CUDA device; the model is on {device.type}")
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(_RUNS_BEFORE_CAPTURE):
            call()
            call.restore_inputs()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _channels_last(call: Call) -> Callable[[], object]:
    num_images = 0

    def converted(leaf: object) -> object:
        nonlocal num_images
        if isinstance(leaf, nn.Module):
            return _module_in_channels_last(leaf, {})
        if isinstance(leaf, Tensor) and leaf.dim() == 4:
            num_images += 1
            return _to_channels_last(leaf)
        return leaf

    function, arguments = map_leaves((call.function, call.arguments), converted)
    if not num_images:
        raise ModeUnavailableError("needs a 4-D input; the module has none")
    return replace(call, function=function, arguments=arguments)


def _to_channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _module_in_channels_last(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    """Copy a module with converted tensors and shared attributes: a deep copy would include a Trainer."""
    if id(module) in copies:
        return copies[id(module)]
    new = copies[id(module)] = module.__new__(type(module))
    vars(new).update(vars(module))
    new._modules = {
        name: None if child is None else _module_in_channels_last(child, copies)
        for name, child in module._modules.items()
    }
    new._parameters = {
        name: None if p is None else nn.Parameter(_to_channels_last(p.detach()), p.requires_grad)
        for name, p in module._parameters.items()
    }
    new._buffers = {name: None if b is None else _to_channels_last(b) for name, b in module._buffers.items()}
    return new


def num_samples(batch: Batch) -> int:
    """Return the length of the first tensor with a dimension, which counts the samples.

    Raises:
        ValueError: If there is no such tensor.
    """
    for leaf in leaves_of(batch):
        if isinstance(leaf, PackedSequence):
            return int(leaf.batch_sizes[0])
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.size(0)
    raise ValueError(f"example_batch: expected a batch that holds a batched tensor, got {type(batch).__name__}")


def check_resizable(batch: Batch) -> None:
    """Check that the samples of a batch can be repeated and cut.

    Raises:
        ValueError: If an entry counts the samples elsewhere than in the first dimension of a tensor: a
            `PackedSequence`, a nested tensor, or a mask of shape (T, B) or (B · heads, T, T).
    """
    given = num_samples(batch)
    for leaf in leaves_of(batch):
        fixed = ""
        if isinstance(leaf, PackedSequence):
            fixed = f"a PackedSequence of {int(leaf.batch_sizes[0])} sequences"
        elif isinstance(leaf, Tensor) and leaf.is_nested:
            fixed = f"a nested tensor of {leaf.size(0)} sequences"
        elif isinstance(leaf, Tensor) and leaf.dim() > 1 and given != 1 and leaf.shape[0] != given:
            shape = tuple(leaf.shape)
            is_mask_of_heads = len(shape) == 3 and shape[0] % given == 0 and shape[1] == shape[2]
            fixed = f"a tensor of shape {shape}" if given in shape[1:] or is_mask_of_heads else ""
        if fixed:
            raise ValueError(
                f"example_batch: expected tensors whose first dimension counts the {given} samples, got {fixed}. "
                f"Reshape the entry in forward_fn, or set batch_sizes=[{given}]."
            )


def resized(batch: Batch, size: int) -> Batch:
    """Copy a batch with its samples repeated or cut to ``size``; other tensors keep their shapes."""
    given = num_samples(batch)

    def resize(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.dim() == 0 or leaf.shape[0] != given or size == given:
            return leaf.clone()  # the model may modify it
        return leaf[torch.arange(size, device=leaf.device) % given]

    return map_leaves(batch, resize)

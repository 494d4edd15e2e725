"""The ways to run a model that are compared; none of them changes the user's model."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import map_leaves
from moe_heads.analysis.inference_timing.calls import Call
from moe_heads.analysis.inference_timing.row import TimingMode

__all__ = ["ModeUnavailableError", "in_mode"]

_NUMBER = itertools.count()
# what torch asks for before a capture, on a stream beside the current one
_RUNS_BEFORE_CAPTURE = 3


class ModeUnavailableError(ValueError):
    """A mode that has no meaning for a module or a device."""


def in_mode(mode: TimingMode, call: Call, device: torch.device) -> Callable[[], object]:
    """The call in another mode, ready to be timed: compiled, captured or converted.

    Args:
        mode: The mode. "bf16" enters autocast in each run, as a server does; "channels_last" converts a copy of the
            weights and the inputs beforehand; "compiled" compiles for this one shape.
        call: The call.
        device: Where it runs.

    Raises:
        ModeUnavailableError: If the mode has no meaning here. Errors of the compiler or of the capture go through.
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
    function = call.function

    def run(*args: Any, **kwargs: Any) -> object:
        return function(*args, **kwargs)

    # torch keeps programs with the code object: with one of its own they go when this call goes, the user's stay, and
    # no number of batch sizes reaches the limit of recompilations
    code = run.__code__.replace(co_name=f"timed_{next(_NUMBER)}")
    own = FunctionType(code, run.__globals__, code.co_name, closure=run.__closure__)
    compiled = replace(call, function=torch.compile(own, dynamic=False))
    compiled()
    compiled.renew()
    return compiled


def _cuda_graph(call: Call, device: torch.device) -> Callable[[], object]:
    if device.type != "cuda":
        raise ModeUnavailableError(f"needs a CUDA device; the model is on {device.type}")
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(_RUNS_BEFORE_CAPTURE):
            call()
            call.renew()
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
            return _with_tensors(leaf, _to_channels_last)
        if isinstance(leaf, Tensor) and leaf.dim() == 4:
            num_images += 1
            return _to_channels_last(leaf)
        return leaf

    args, kwargs = map_leaves((call.args, dict(call.kwargs)), converted)
    if not num_images:
        raise ModeUnavailableError("needs a 4-D input; this module gets none")
    function = call.function
    converted_function = _with_tensors(function, _to_channels_last) if isinstance(function, nn.Module) else function
    return replace(call, function=converted_function, args=args, kwargs=kwargs)


def _to_channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _with_tensors(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module:
    """A module of other tensors and the same everything else: a deep copy would take a Trainer along."""
    known: dict[int, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        if id(module) in known:
            return known[id(module)]
        new = known[id(module)] = module.__new__(type(module))
        vars(new).update(vars(module))
        new._modules = {name: None if child is None else copied(child) for name, child in module._modules.items()}
        new._parameters = {
            name: None if p is None else nn.Parameter(convert(p.detach()), p.requires_grad)
            for name, p in module._parameters.items()
        }
        new._buffers = {name: None if b is None else convert(b) for name, b in module._buffers.items()}
        return new

    return copied(module)

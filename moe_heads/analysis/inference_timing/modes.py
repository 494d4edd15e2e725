"""Execution modes of a call: torch.compile, CUDA graphs, bf16 autocast and the channels_last memory format."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import leaves_of, map_leaves
from moe_heads.analysis.inference_timing.calls import Call, TimingMode
from moe_heads.analysis.inference_timing.compilation import own_module
from moe_heads.analysis.inference_timing.own_code import own_program

__all__ = ["ModeUnavailableError", "form_of", "in_mode"]

# torch requires warm-up runs on a side stream before it captures a graph
_RUNS_BEFORE_CAPTURE = 3


class ModeUnavailableError(ValueError):
    """Error for a mode that does not apply to a module or device."""


def in_mode(
    mode: TimingMode, call: Call, device: torch.device, shared: dict[Any, Any] | None = None
) -> Callable[[], object]:
    """Compile, capture or convert a call for a mode, without any change to the user's model.

    "bf16" enters autocast in each run, as a server does. "channels_last" converts a copy of the weights and the inputs
    once. "compiled" compiles for these shapes only.

    Args:
        mode: The mode.
        call: The call.
        device: Its device.
        shared: Compiled programs and converted modules of the same call on other draws of a batch, which are reused.

    Raises:
        ModeUnavailableError: If the mode does not apply. Errors of the compiler and of the graph capture propagate.
    """
    shared = {} if shared is None else shared
    if mode == "compiled":
        return _compiled(call, shared)
    if mode == "cuda_graph":
        return _cuda_graph(call, device)
    if mode == "channels_last":
        return _channels_last(call, shared)
    return _bf16(call, device) if mode == "bf16" else call


def _bf16(call: Call, device: torch.device) -> Callable[[], object]:
    def run() -> object:
        with torch.autocast(device.type, torch.bfloat16):
            return call()

    return run


def _compiled(call: Call, programs: dict[Any, Any]) -> Callable[[], object]:
    # where a program ends within the model, torch continues in the code objects of its methods
    function, arguments = map_leaves(
        (call.function, call.arguments),
        lambda leaf: own_module(leaf, is_compiled=False) if isinstance(leaf, nn.Module) else leaf,
    )

    def run(*args: Any, **kwargs: Any) -> object:
        return function(*args, **kwargs)

    def run_all(*runs: tuple[Sequence[Any], Mapping[str, Any]]) -> None:
        for args, kwargs in runs:
            function(*args, **kwargs)

    if len(arguments) > 1:
        run, arguments = run_all, ((arguments, {}),)  # one program for all runs
    form = form_of(call)
    if form not in programs:
        programs[form] = own_program(run, partial(torch.compile, dynamic=False))
    compiled = replace(call, function=programs[form], arguments=arguments)
    compiled()
    compiled.restore_inputs()
    return compiled


def form_of(call: Call) -> Any:
    """Return a key of the shapes of the arguments of a call."""
    return tuple(leaf.shape if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves_of(call.arguments))


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


def _channels_last(call: Call, copies: dict[int, nn.Module]) -> Callable[[], object]:
    num_images = 0

    def converted(leaf: object) -> object:
        nonlocal num_images
        if isinstance(leaf, nn.Module):
            return _module_in_channels_last(leaf, copies)
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

"""Functions with a code object of their own, with which torch keeps compiled programs, and records of torch.compile."""

import inspect
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

__all__ = ["Compiler", "compiler_of", "own_copy_of", "own_program", "records_kept", "uses_compiled_functions"]

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Function that compiles another one with the backend and the options of the user."""

_NUMBERS = itertools.count()


def compiler_of(function: Any) -> Compiler | None:
    """Return the compiler of a function that `torch.compile` returned; None for any other object."""
    attributes = getattr(function, "__dict__", {})
    if isinstance(function, (type, nn.Module)) or "get_compiler_config" not in attributes:
        return None
    # the context of torch.compile holds backend and options, and has no public access
    known = inspect.getclosurevars(attributes["get_compiler_config"]).nonlocals.get("self")
    return torch.compile if known is None else known


def own_program(function: Callable[..., Any], compiler: Compiler) -> Callable[..., Any]:
    """Compile a function with a code object of its own.

    torch caches compiled programs per code object. With its own code object, a program is freed together with the
    function, the user's programs stay, and no number of batch sizes reaches the recompilation limit.
    """
    return compiler(_with_own_code(function, f"timed_{next(_NUMBERS)}"))


def own_copy_of(
    function: Any, *, is_compiled: bool, owner: nn.Module | None = None, original: nn.Module | None = None
) -> Any:
    """Copy a function with a code object of its own, also the compiled functions that it finds among its globals.

    Args:
        function: The function, compiled or not.
        is_compiled: Whether a compiled function has a compiled copy.
        owner: Module to which the copies of methods are bound.
        original: Module to which the methods are bound.
    """
    compiler, plain = compiler_of(function), function
    while compiler_of(plain) is not None:
        plain = plain._torchdynamo_orig_callable
    is_method = owner is not None and _is_method_of(plain, original, function)
    inner = getattr(plain, "__func__", plain)
    if not isinstance(inner, FunctionType):
        return function
    code_name = f"{inner.__code__.co_name}_{next(_NUMBERS)}"
    own: Any = _with_own_code(inner, code_name, _own_globals(inner, is_compiled=is_compiled))
    if is_compiled and compiler is not None:
        own = compiler(own)
    return MethodType(own, owner) if is_method else own


def uses_compiled_functions(module: nn.Module) -> bool:
    """Return whether a module has compiled functions among its attributes, or its forward among its globals."""
    if any(compiler_of(value) is not None for name, value in vars(module).items() if name != "_compiled_call_impl"):
        return True
    forward = inspect.unwrap(type(module).forward)
    return bool(isinstance(forward, FunctionType) and _compiled_globals(forward))


@contextmanager
def records_kept() -> Iterator[None]:
    """Restore the counters of torch.compile when the block ends."""
    before = {name: Counter(counts) for name, counts in _counters().items()}
    try:
        yield
    finally:
        counters = _counters()
        counters.clear()
        counters.update(before)


def _counters() -> Any:
    # not imported: without the compiler there are no counters
    module: Any = sys.modules.get("torch._dynamo.utils")
    return {} if module is None else module.counters


def _is_method_of(plain: Any, original: nn.Module | None, function: Any) -> bool:
    if isinstance(plain, MethodType):
        return plain.__self__ is original
    # a function of the class, and not an attribute of the module
    return not any(function is value for value in vars(original or nn.Module).values())


def _with_own_code(
    function: Callable[..., Any], name: str, own_globals: dict[str, Any] | None = None
) -> Callable[..., Any]:
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=name)
    own = FunctionType(
        code, own_globals or function.__globals__, name, function.__defaults__, closure=function.__closure__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def _compiled_globals(function: FunctionType) -> dict[str, Any]:
    found = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    return {name: value for name, value in found.items() if compiler_of(value) is not None}


def _own_globals(function: FunctionType, *, is_compiled: bool) -> dict[str, Any] | None:
    compiled = _compiled_globals(function)
    copies = {name: own_copy_of(value, is_compiled=is_compiled) for name, value in compiled.items()}
    return {**function.__globals__, **copies} if copies else None

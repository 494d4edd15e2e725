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

__all__ = ["CodeCopies", "Compiler", "compiler_of", "own_program", "records_kept", "uses_compiled_functions"]

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
    assert isinstance(function, FunctionType)
    return compiler(_with_own_code(function, f"timed_{next(_NUMBERS)}", function.__globals__))


class CodeCopies:
    """Copies of functions with code objects of their own, and of the functions of the same package that they call.

    The latter matter where torch.compile cannot trace a function to its end, and continues with those that it calls.

    Args:
        is_compiled: Whether a compiled function has a compiled copy.
    """

    def __init__(self, *, is_compiled: bool) -> None:
        self._is_compiled = is_compiled
        self._functions: dict[int, Any] = {}
        self._globals: dict[int, dict[str, Any]] = {}

    def of(self, function: Any, owner: nn.Module | None = None, original: nn.Module | None = None) -> Any:
        """Return the copy of a function; an object without Python code is returned unchanged.

        Args:
            function: The function, compiled or not.
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
        own = self._plain(inner)
        if self._is_compiled and compiler is not None:
            own = compiler(own)
        return MethodType(own, owner) if is_method else own

    def _plain(self, function: FunctionType) -> Any:
        if id(function) not in self._functions:
            known = self._globals.setdefault(id(function.__globals__), dict(function.__globals__))
            name = f"{function.__code__.co_name}_{next(_NUMBERS)}"
            self._functions[id(function)] = _with_own_code(function, name, known)
            for used in function.__code__.co_names:
                value = function.__globals__.get(used)
                if compiler_of(value) is not None or _is_of_package(value, function):
                    known[used] = self.of(value)
        return self._functions[id(function)]


def uses_compiled_functions(module: nn.Module) -> bool:
    """Return whether a module has compiled functions among its attributes, or its forward among its globals."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    if any(compiler_of(value) is not None for name, value in vars(module).items() if name != "_compiled_call_impl"):
        return True
    forward = inspect.unwrap(type(module).forward)
    return isinstance(forward, FunctionType) and _calls_compiled(forward)


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


def _is_of_package(value: Any, function: FunctionType) -> bool:
    package = (function.__module__ or "").split(".")[0]
    return isinstance(value, FunctionType) and (value.__module__ or "").split(".")[0] == package != "torch"


def _with_own_code(function: FunctionType, name: str, own_globals: dict[str, Any]) -> FunctionType:
    code = function.__code__.replace(co_name=name)
    own = FunctionType(code, own_globals, name, function.__defaults__, closure=function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def _calls_compiled(function: FunctionType) -> bool:
    return any(compiler_of(function.__globals__.get(name)) is not None for name in function.__code__.co_names)

"""Compiled parts of a model, and copies of them that leave the user's compiled programs alone.

torch keeps compiled programs with the code object of a function. A run with another batch size would add one to those
of the user. The copies share all tensors with the model, and have code objects of their own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from moe_heads.analysis._shared.batches import ForwardFn
from moe_heads.analysis.inference_timing.calls import Call, RowMode
from moe_heads.analysis.inference_timing.own_code import (
    CodeCopies,
    Compiler,
    compiler_of,
    own_program,
    uses_compiled_functions,
)

__all__ = ["Compilation", "compilation_of"]


@dataclass(frozen=True)
class Compilation:
    """Parts of a model that run compiled.

    Attributes:
        model: Copy of the model in which nothing is compiled.
        forward_fn: The function that runs it, not compiled either.
        modules: The modules of the user's model, by their names in the copy.
        compilers: Compilers of the modules that are compiled as a whole, by name.
        with_functions: Names of the modules that call compiled functions.
    """

    model: nn.Module
    forward_fn: ForwardFn
    modules: Mapping[str, nn.Module]
    compilers: Mapping[str, Compiler]
    with_functions: frozenset[str]
    _programs: dict[Any, nn.Module] = field(default_factory=dict)

    def mode_of(self, name: str) -> RowMode:
        """Return the mode in which a module runs inside the model, by its dotted name."""
        if self._outer(name) is not None:
            return "compiled"
        inside = [other for other in (*self.compilers, *self.with_functions) if _is_inside(other, name)]
        return "partly_compiled" if inside else "eager"

    def as_given(self, name: str, call: Call, form: Any) -> Call:
        """Return the call of a module that runs compiled as inside the model. The first run compiles it.

        Args:
            name: Dotted name of the module, "" for the model.
            call: The call of the uncompiled copy, or of a dense twin.
            form: Key of the shapes of its inputs. Calls of the same shapes share their programs.
        """
        (args, _), *_ = call.arguments
        is_forward = not isinstance(call.function, nn.Module)
        function = args[0] if is_forward else call.function
        key = name, id(function), form
        if key not in self._programs:
            self._programs[key] = self._fresh(name, function)
        fresh = self._programs[key]
        if not is_forward:
            return replace(call, function=fresh)
        return replace(call, arguments=tuple(((fresh, *args[1:]), kwargs) for args, kwargs in call.arguments))

    def _fresh(self, name: str, function: Any) -> nn.Module:
        outer = self._outer(name)
        original = self.modules[name]
        if type(function) is not type(original):  # the dense twin
            original = function
        if outer is None:
            return own_module(original, is_compiled=True)
        module = own_module(original, is_compiled=False)
        _compile(module, outer)
        return module

    def _outer(self, name: str) -> Compiler | None:
        """Return the compiler of the outermost compiled module around, or at, a name."""
        names = [outer for outer in self.compilers if _is_inside(name, outer)]
        return self.compilers[min(names, key=len)] if names else None


def compilation_of(model: nn.Module, forward_fn: ForwardFn) -> Compilation | None:
    """Return what of a model runs compiled; None if nothing does."""
    modules, compilers = dict[str, nn.Module](), dict[str, Compiler]()
    for name, module, compiler in _walk(model, ""):
        modules[name] = module
        if compiler is not None:
            compilers[name] = compiler
    of_function = compiler_of(forward_fn)
    if of_function is not None:
        compilers[""] = of_function
        forward_fn = CodeCopies(is_compiled=False).of(forward_fn)
    with_functions = frozenset(name for name, module in modules.items() if uses_compiled_functions(module))
    if not compilers and not with_functions:
        return None
    return Compilation(own_module(model, is_compiled=False), forward_fn, modules, compilers, with_functions)


def own_module(module: nn.Module, *, is_compiled: bool) -> nn.Module:
    """Copy a module with shared tensors and attributes, and code objects of its own.

    Args:
        module: The module.
        is_compiled: Whether to compile what is compiled in the module. Otherwise nothing is.
    """
    return _own_module(module, is_compiled, CodeCopies(is_compiled=is_compiled), {})


def _own_module(
    module: nn.Module, is_compiled: bool, functions: CodeCopies, modules: dict[int, nn.Module]
) -> nn.Module:
    inner, compiler = _unwrapped(module)
    if isinstance(inner, torch.jit.ScriptModule):
        return inner  # TorchScript has no Python code
    if id(inner) not in modules:
        new: nn.Module = object.__new__(type(inner))
        modules[id(inner)] = new
        vars(new).update(vars(inner))
        vars(new)["_compiled_call_impl"] = None
        new._modules = {
            name: None if child is None else _own_module(child, is_compiled, functions, modules)
            for name, child in inner._modules.items()
        }
        for name, function in _functions_of(inner):
            vars(new)[name] = functions.of(function, new, inner)
        if is_compiled and compiler is not None:
            _compile(new, compiler)
    return modules[id(inner)]


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, Compiler | None]]:
    """Yield the modules inside of wrappers with their names and compilers.

    Yields:
        The dotted name without those of wrappers, the module, and its compiler, or None.
    """
    inner, compiler = _unwrapped(module)
    yield name, inner, compiler
    for child_name, child in inner.named_children():
        yield from _walk(child, f"{name}.{child_name}".lstrip("."))


def _unwrapped(module: nn.Module) -> tuple[nn.Module, Compiler | None]:
    """Return a module without the wrapper of torch.compile, and its compiler."""
    compiler: Compiler | None = None
    while type(module).__name__ == "OptimizedModule" and hasattr(module, "dynamo_ctx"):
        inner: Any = module
        compiler, module = inner.dynamo_ctx, inner._orig_mod
    if isinstance(module, torch.jit.ScriptModule):
        return module, compiler
    own: Any = vars(module).get("_compiled_call_impl")
    compiler = compiler or (None if own is None else compiler_of(own))
    return module, compiler or compiler_of(vars(module).get("forward", type(module).forward))


def _functions_of(module: nn.Module) -> list[tuple[str, Callable[..., Any]]]:
    """Return the methods of the user's classes and the compiled functions among the attributes, by name."""
    found: dict[str, Callable[..., Any]] = {}
    for cls in reversed(type(module).__mro__):
        if not cls.__module__.startswith(("torch.", "lightning.", "pytorch_lightning.")):
            found |= {name: value for name, value in vars(cls).items() if _is_function(name, value)}
    own = {name: value for name, value in vars(module).items() if _is_function(name, value)}
    return list(
        {**found, **{name: value for name, value in own.items() if compiler_of(value) or name in found}}.items()
    )


def _is_function(name: str, value: Any) -> bool:
    is_plain = hasattr(value, "__code__") or compiler_of(value) is not None
    return is_plain and not (name.startswith("__") and name.endswith("__"))


def _compile(module: nn.Module, compiler: Compiler) -> None:
    run: Any = module._call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    vars(module)["_compiled_call_impl"] = own_program(call, compiler)


def _is_inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")

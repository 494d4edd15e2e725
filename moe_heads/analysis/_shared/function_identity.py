"""Whether a function is still the one that it was in another process, as far as that can be known."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

__all__ = ["code_of"]


def code_of(function: Callable[..., Any] | None) -> bytes:
    """Fingerprint of a function's code, and of the code of the functions that it closes over.

    Comments, names of files and numbers of lines do not count. Not seen is what a function calls by a global name, nor
    the values that it closes over; and another version of Python compiles to other code. Of an object that is called,
    its kind and its ``__call__`` count.
    """
    digest = hashlib.blake2b()
    for part in _parts(function, set()):
        digest.update(repr(part).encode())
    return digest.digest()


def _parts(function: Any, seen: set[int]) -> Iterator[Any]:
    if id(function) in seen:  # a function may close over itself
        return
    seen.add(id(function))
    if isinstance(function, FunctionType):
        yield from _code(function.__code__)
        for cell in function.__closure__ or ():
            content = _content(cell)
            if isinstance(content, (FunctionType, MethodType, partial)):
                yield from _parts(content, seen)
    elif isinstance(function, MethodType):
        yield from _parts(function.__func__, seen)
    elif isinstance(function, partial):
        yield from _parts(function.func, seen)
    else:
        kind = type(function)
        yield f"{kind.__module__}.{kind.__qualname__}"
        if isinstance(kind.__call__, FunctionType):
            yield from _parts(kind.__call__, seen)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None


def _code(code: CodeType) -> Iterator[Any]:
    yield code.co_code
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            # the order of a set of strings is another one in every process
            yield sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant

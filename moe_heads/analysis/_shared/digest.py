"""Fingerprints of tensors, of other values and of the code of functions, to compare them bit for bit."""

import hashlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from moe_heads.analysis._shared.shards import local

__all__ = ["digest_of", "digest_of_code", "digest_of_rows"]


def digest_of(values: Iterable[Any]) -> bytes:
    """Return a fingerprint of values in their order: bits, shapes and data types of tensors, pickles of other values.

    Only equal values have equal fingerprints. A value that cannot be pickled makes the fingerprint unique.
    """
    digest = hashlib.blake2b()
    for value in values:
        if isinstance(value, tuple):  # including packed sequences
            digest.update(digest_of(value))
        elif isinstance(value, Tensor) and value.layout == torch.sparse_coo:
            coalesced = value.detach().coalesce()
            digest.update(digest_of((coalesced.indices(), coalesced.values(), tuple(value.shape))))
        elif isinstance(value, Tensor):
            value = local(value)
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(_bits(value))
        else:
            digest.update(_pickled(value))
    return digest.digest()


def digest_of_rows(parts: Iterable[Tensor]) -> bytes:
    """Return a fingerprint of the rows of tensors that does not depend on the division of the rows into tensors."""
    digest = hashlib.blake2b()
    kind = ""
    for part in parts:
        if kind != (kind := f"{part.dtype}{tuple(part.shape[1:])}"):
            digest.update(kind.encode())
        digest.update(_bits(part))
    return digest.digest()


def digest_of_code(function: Callable[..., Any] | None) -> bytes:
    """Return a fingerprint of a function's code and of the code of the functions that it closes over.

    Use it to check whether a function is the same as in another process. Comments, file names and line numbers are
    ignored. Functions called by a global name and other values in the closure are not covered, and another version of
    Python compiles to different code. For a callable object, its type and its ``__call__`` count.
    """
    digest = hashlib.blake2b()
    for part in _parts_of_function(function, set()):
        digest.update(repr(part).encode())
    return digest.digest()


def _bits(value: Tensor) -> memoryview | bytes:
    dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
    bits = dense.to("cpu").contiguous().reshape(-1)
    return bits.view(torch.uint8).numpy().data if value.numel() else b""


def _pickled(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return os.urandom(32)


def _parts_of_function(function: Any, visited: set[int]) -> Iterator[Any]:
    if id(function) in visited:  # a function may close over itself
        return
    visited.add(id(function))
    if isinstance(function, FunctionType):
        yield from _parts_of_code(function.__code__)
        for cell in function.__closure__ or ():
            content = _content(cell)
            if isinstance(content, (FunctionType, MethodType, partial)):
                yield from _parts_of_function(content, visited)
    elif isinstance(function, MethodType):
        yield from _parts_of_function(function.__func__, visited)
    elif isinstance(function, partial):
        yield from _parts_of_function(function.func, visited)
    else:
        kind = type(function)
        yield f"{kind.__module__}.{kind.__qualname__}"
        if isinstance(kind.__call__, FunctionType):
            yield from _parts_of_function(kind.__call__, visited)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None


def _parts_of_code(code: CodeType) -> Iterator[Any]:
    yield code.co_code
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts_of_code(constant)
        else:
            # the order of a set of strings differs between processes
            yield sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant

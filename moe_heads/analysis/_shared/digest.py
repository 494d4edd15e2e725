"""Whether two collections of tensors and other values are bit for bit the same, without keeping either."""

import hashlib
import os
import pickle
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["digest_of", "digest_of_rows"]


def digest_of(values: Iterable[Any]) -> bytes:
    """Fingerprint of values in their order: of the bits, shapes and data types of tensors, of what else can be pickled.

    Equal for equal values only; a value that cannot be pickled makes the fingerprint one of a kind.
    """
    digest = hashlib.blake2b()
    for value in values:
        if isinstance(value, tuple):  # a packed sequence too
            digest.update(digest_of(value))
        elif isinstance(value, Tensor) and value.layout == torch.sparse_coo:
            coalesced = value.detach().coalesce()
            digest.update(digest_of((coalesced.indices(), coalesced.values(), tuple(value.shape))))
        elif isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(_bits(value))
        else:
            digest.update(_pickled(value))
    return digest.digest()


def digest_of_rows(parts: Iterable[Tensor]) -> bytes:
    """Fingerprint of the rows of tensors, one after the other: the same however they are cut into tensors."""
    digest = hashlib.blake2b()
    kind = ""
    for part in parts:
        if kind != (kind := f"{part.dtype}{tuple(part.shape[1:])}"):
            digest.update(kind.encode())
        digest.update(_bits(part))
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

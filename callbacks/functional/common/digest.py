"""Whether two collections of tensors and other values are bit for bit the same, without keeping either."""

import hashlib
import os
import pickle
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["digest_of"]


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
            dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            bits = dense.to("cpu").contiguous().reshape(-1)
            digest.update(bits.view(torch.uint8).numpy().data if value.numel() else b"")
        else:
            digest.update(_pickled(value))
    return digest.digest()


def _pickled(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return os.urandom(32)

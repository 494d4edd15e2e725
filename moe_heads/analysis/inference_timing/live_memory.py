"""How much memory the tensors of a call hold at once."""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["LiveMemory", "num_bytes"]


class LiveMemory:
    """Adds up the storages that are alive; what a kernel takes for itself in between is not seen.

    Attributes:
        peak: Most bytes at once.
    """

    def __init__(self) -> None:
        self.peak = self._now = 0
        self._known: dict[int, int] = {}

    def add(self, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
        """Count what an operator made, until it is freed.

        Args:
            inputs: Its inputs: what it writes into them or returns as views of them was there before.
            outputs: Its outputs.
        """
        before = {storage._cdata for storage in _storages(inputs)}
        for storage in _storages(outputs):
            key = storage._cdata
            if key not in before and key not in self._known:
                self._known[key] = storage.nbytes()
                self._now += storage.nbytes()
                weakref.finalize(storage, self._forget, key)
        self.peak = max(self.peak, self._now)

    def _forget(self, key: int) -> None:
        self._now -= self._known.pop(key, 0)


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    has_one = (tensor for tensor in tensors if tensor.layout == torch.strided and not tensor.is_nested)
    return [tensor.untyped_storage() for tensor in has_one]


def num_bytes(tensor: Tensor) -> int:
    """Bytes of the entries of a tensor; of a sparse one with their indices, 8 bytes a dimension."""
    if tensor.layout == torch.strided:
        return tensor.nbytes
    if tensor.is_sparse or tensor.is_sparse_csr:
        return tensor._nnz() * (tensor.element_size() + 8 * tensor.dim())
    return tensor.numel() * tensor.element_size()

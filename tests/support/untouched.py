"""That an analysis left the model and the random number generators bit for bit as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Assert, also after an error inside the block, that nothing has changed."""
    before, tensors = _state(model), _tensors(model)
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        assert _state(model) == before
        assert [id(t) for t in _tensors(model)] == [id(t) for t in tensors]
        for now, then in zip(tensors, values, strict=True):
            assert torch.equal(_bits(now), _bits(then))


def _tensors(model: nn.Module) -> list[Tensor]:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [*model.parameters(), *model.buffers(), *grads]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _state(model: nn.Module) -> tuple[object, ...]:
    return (
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad is None for p in model.parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )

"""Deactivation of torch's fast paths that change the function or cannot be differentiated twice."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn

from moe_heads.analysis._shared.forwards import intercepted, is_opaque
from moe_heads.analysis._shared.plain_functions import plain_functions

__all__ = ["plain_paths"]


@contextmanager
def plain_paths(model: nn.Module) -> Iterator[None]:
    """Evaluate the function that training differentiates, with dense gradients, while the block runs.

    - The fast path of `torch.nn.TransformerEncoder` and `torch.nn.MultiheadAttention` is off. torch takes it in
      evaluation mode when no gradient is recorded. With a padding mask it returns zeros at padded positions.
    - Recurrent layers run without cuDNN, whose backward pass works in training mode only and has no second derivative.
    - Gradients of embeddings are dense. ``sparse=True`` changes their layout, not their values.
    - Hardsigmoid and some other functions without a second derivative are computed from others; see `plain_functions`.
    """
    recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase) and not is_opaque(module)]
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for module in model.modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
                stack.callback(setattr, module, "sparse", module.sparse)
                module.sparse = False
        stack.enter_context(plain_functions())
        stack.enter_context(intercepted(recurrent, _without_cudnn))
        yield


def _without_cudnn(
    module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    # not cudnn.flags(), which resets the other flags to its own defaults
    cudnn = cast(Any, torch.backends.cudnn)
    before = cudnn.enabled
    cudnn.enabled = False
    try:
        return forward(*args, **kwargs)
    finally:
        cudnn.enabled = before

"""The state under which every analysis evaluates a model."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe_heads.analysis._shared.arguments import check_arguments
from moe_heads.analysis._shared.generators import seed_generators
from moe_heads.analysis._shared.half_precision import half_modules_in_autocast
from moe_heads.analysis._shared.plain_paths import plain_paths
from moe_heads.analysis._shared.state import Original, preserved

__all__ = ["analysis_mode"]


@contextmanager
def analysis_mode(model: nn.Module, seed: int = 0) -> Iterator[Original]:
    """State under which every analysis of this package evaluates a model, undone on leaving the block.

    Evaluation mode, gradients enabled, torch.compile off and the mathematical attention kernel (compiled code and the
    fused kernels have no second derivative), the same function with and without gradients, random
    number generators seeded with ``seed``. Autocast is off, except in the parts of a model whose weights are in half
    precision. Then everything that `preserved` covers is put back.

    Args:
        model: The model to evaluate.
        seed: Seed of the generators inside the block; equal seeds give equal results.

    Yields:
        The values that a parameter or buffer had before; see `preserved`.

    Raises:
        ValueError: If ``model`` is no module, or the seed is out of range.
    """
    check_arguments(model=model, seed=seed)
    with ExitStack() as stack:
        original = stack.enter_context(preserved(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for device_type in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(half_modules_in_autocast(model))
        stack.enter_context(plain_paths(model))
        seed_generators(seed)
        model.eval()
        yield original

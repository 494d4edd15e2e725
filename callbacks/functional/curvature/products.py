"""Products with the Hessian of one batch, by the cheapest way that is possible and right.

The ladder, in units of the time of a gradient (measured, docs/results.md): forward over reverse mode, traced
(`LinearizedGradient`); double backward through a first-order graph that is kept; the same with the graph rebuilt.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from moe_heads.callbacks.functional.common.batches import Batch, LossFn, leaves_of
from moe_heads.callbacks.functional.common.memory import available_memory
from moe_heads.callbacks.functional.common.microbatches import Microbatches, free_memory, unless_out_of_memory
from moe_heads.callbacks.functional.common.monitor import Monitor
from moe_heads.callbacks.functional.curvature.culprit import layer_of
from moe_heads.callbacks.functional.curvature.folding import Fold, find_folds, folded
from moe_heads.callbacks.functional.curvature.linearized import LinearizedGradient, can_be_traced
from moe_heads.callbacks.functional.curvature.loss_graph import (
    NoSecondDerivative,
    checked_loss,
    gradient_with_graph,
    saved_bytes,
    second_order_errors,
)

__all__ = ["CPU_GRAPH_MEMORY", "BatchProducts", "GraphMode"]

CPU_GRAPH_MEMORY = 4 * 2**30
"""Bytes that may be kept between products on a CPU unless the caller says otherwise, or half of what is free."""

GraphMode = Literal["linearized", "kept", "rebuilt"]

# A trace takes seconds. It saves a fifth of each product, which pays in some fifty products of graphs of this size.
_TRACE_ABOVE = 64 * 2**20

# Memory of a batch's graph that tracing it takes for a moment.
_TRACING_FACTOR = 4

Product = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""From a direction to the derivative of a batch's gradient in that direction, one tensor a parameter."""


class BatchProducts:
    r"""Products :math:`\nabla^2 \ell_b v` with the Hessians of single batches' mean losses.

    What is kept between products, and whether batch norms are folded, is settled once: each way is tried on the first
    batch and compared with the plain double backward, before anything relies on it.

    Args:
        model: The model, in evaluation mode.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        params: The parameters, by name.
        data: The batches.
        monitor: Looked at before each batch.
        memory: Bytes that may be kept; None for the default.
        mode: The first rung to try; None for the best.

    Attributes:
        mode: How the first batch is done, "linearized", "kept" or "rebuilt".
        num_folded: Batch norms that are folded into the layer before them.
        num_kept: Batches for which something is kept; the others are rebuilt in each product.
        reason: Why a faster way was not taken; "" where there is none.
    """

    mode: GraphMode

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        params: dict[str, Tensor],
        data: Microbatches,
        monitor: Monitor,
        *,
        memory: int | None = None,
        mode: GraphMode | None = None,
    ) -> None:
        if mode is not None and mode not in get_args(GraphMode):
            raise ValueError(f"mode: expected one of {get_args(GraphMode)} or None; got {mode!r}")
        self._model, self._loss_fn, self._params = model, loss_fn, params
        self._device = next(iter(params.values())).device
        self._monitor = monitor
        self._others = [p for p in model.parameters() if p.requires_grad and all(p is not q for q in params.values())]
        self._folds: list[Fold] = []
        self._programs: dict[object, LinearizedGradient] = {}
        self._kept: list[Product] = []
        self.mode, self.reason = "rebuilt", ""
        if unless_out_of_memory(partial(self._settle, data, memory, mode)) is None:
            self.release("memory ran out")

    @property
    def num_folded(self) -> int:
        """Batch norms that are folded."""
        return len(self._folds)

    @property
    def num_kept(self) -> int:
        """Batches for which something is kept."""
        return len(self._kept)

    def product(self, index: int, batch: Batch, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """The product of a batch with a vector, both in the parts that belong to the parameters."""
        if index < len(self._kept):
            return self._kept[index](tangents)
        return self._differentiate(self._gradient(index, batch, self._folds), tangents, retain_graph=False)

    def check_loss(self, index: int, batch: Batch) -> None:
        """Refuse a batch whose loss is not what it should be."""
        with self._evaluation(index, []):
            checked_loss(self._loss_fn(self._model, batch), index)

    def release(self, reason: str = "") -> None:
        """Let go of all that is kept."""
        self._kept, self._programs = [], {}
        self.mode, self.reason = "rebuilt", reason or self.reason
        free_memory()

    def _settle(self, data: Microbatches, memory: int | None, mode: GraphMode | None) -> bool:
        """Find the way; True."""
        first, *_ = data
        try:
            check = _Check(self, first)
        except NoSecondDerivative as error:
            layer = layer_of(self._model, lambda: self._loss_fn(self._model, first), str(error))
            if not layer:
                raise
            raise NoSecondDerivative(f"{layer}: {error}") from error.__cause__
        self._folds = check.folds
        if self._folds and not check.passes(self._prepared(0, first)):
            self._folds, self.reason = [], "folded batch norms gave another product"
        memory = _default_memory(self._device) if memory is None else memory
        sizes = self._sizes(data, memory)
        num_fitting = sum(total <= memory for total in torch.tensor(sizes, dtype=torch.float64).cumsum(0).tolist())
        if num_fitting == 0 or mode == "rebuilt":
            return True
        if mode in (None, "linearized") and self._traced(data, sizes, memory, check, forced=mode is not None):
            self.mode = "linearized"
        else:
            self.mode = "kept"
        batches = list(data)[:num_fitting]
        self._kept = [self._prepared(index, batch) for index, batch in enumerate(batches)]
        return True

    def _traced(self, data: Microbatches, sizes: Sequence[float], memory: int, check: "_Check", forced: bool) -> bool:
        """Whether there is a program for the shape of the first batch, and it is right."""
        first, *_ = data
        alike = [can_be_traced(batch) and _shape(batch) == _shape(first) for batch in data]
        if not alike[0]:
            self.reason = "a batch holds something else than tensors"
            return False
        total = sum(size for size, is_alike in zip(sizes, alike, strict=True) if is_alike)
        if not forced and (total < _TRACE_ABOVE or _TRACING_FACTOR * sizes[0] > memory):
            return False
        try:
            with self._evaluation(0, self._folds):
                program = LinearizedGradient(self._model, self._loss_fn, self._params, first)
            is_right = check.passes(self._bound(program, 0, first))
        except Exception as error:  # of any kind: what cannot be traced is differentiated by autograd
            self.reason = f"{type(error).__name__}: {error}"
            return False
        if is_right:
            self._programs[_shape(first)] = program
        else:
            self.reason = "the traced derivative gave another product"
        return is_right

    def _prepared(self, index: int, batch: Batch) -> Product:
        self._monitor.tick()
        program = self._programs.get(_shape(batch))
        if program is not None:
            return self._bound(program, index, batch)
        return partial(self._differentiate, self._gradient(index, batch, self._folds), retain_graph=True)

    def _bound(self, program: LinearizedGradient, index: int, batch: Batch) -> Product:
        with self._evaluation(index, []):
            return program.bind(batch)

    def _gradient(self, index: int, batch: Batch, folds: list[Fold]) -> tuple[Tensor, ...]:
        """Gradient of a batch's mean loss, with its graph."""
        with self._evaluation(index, folds):
            loss = checked_loss(self._loss_fn(self._model, batch), index)
            return gradient_with_graph(loss, tuple(self._params.values()))

    @contextmanager
    def _evaluation(self, index: int, folds: list[Fold]) -> Iterator[None]:
        """Batch norms folded, the random numbers of the batch, and no graph of the parameters that stay as they are."""
        with ExitStack() as stack:
            stack.enter_context(folded(folds))
            stack.enter_context(_replayed(self._device, seed=index))
            for other in self._others:
                other.requires_grad_(False)
                stack.callback(other.requires_grad_, True)
            yield

    def _differentiate(
        self, gradient: tuple[Tensor, ...], tangents: Sequence[Tensor], *, retain_graph: bool
    ) -> Sequence[Tensor]:
        # A gradient without a graph is constant (an unused or a linear parameter): its derivative is zero.
        curved = [(g, tangent) for g, tangent in zip(gradient, tangents, strict=True) if g.requires_grad]
        if not curved:
            return [torch.zeros_like(tangent) for tangent in tangents]
        outputs, directions = zip(*curved, strict=True)
        with second_order_errors():
            return torch.autograd.grad(
                outputs,
                tuple(self._params.values()),
                directions,
                retain_graph=retain_graph,
                allow_unused=True,
                materialize_grads=True,
            )

    def _sizes(self, data: Microbatches, memory: int) -> list[float]:
        """Bytes to keep for each batch, judged by the first one."""
        # Each batch's gradient is held as well. Most of the time this alone tells for a large model.
        gradient = sum(p.numel() * p.element_size() for p in self._params.values())
        if gradient > memory:
            return [float(gradient)] * len(data)
        first, *_ = data
        # The graph measured is thrown away: under the measuring hooks autograd does not notice in-place changes.
        held = saved_bytes(lambda: self._gradient(0, first, self._folds), besides=self._model.parameters())
        elements = [_num_elements(batch) for batch in data]
        return [gradient + held * count / max(elements[0], 1) for count in elements]


class _Check:
    """The plain product of the first batch, against which every other way is held."""

    def __init__(self, products: BatchProducts, batch: Batch) -> None:
        params = list(products._params.values())
        generator = torch.Generator().manual_seed(0)
        self._tangents = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in params]
        gradient: list[Tensor] = []
        self.folds = find_folds(products._model, lambda: gradient.extend(products._gradient(0, batch, [])))
        self._expected = products._differentiate(tuple(gradient), self._tangents, retain_graph=False)
        # Rounding moves a few units across the kink of a ReLU: 1e-3 lets them pass, and no wrong formula.
        self._tolerance = 1e-3 if params[0].dtype == torch.float32 else 1e-7

    def passes(self, product: Product) -> bool:
        """Whether a way gives this product, and gives it again."""
        for _ in range(2):
            found = product(self._tangents)
            pairs = zip(found, self._expected, strict=True)
            error = sum(float((a - b).square().sum(dtype=torch.float64)) for a, b in pairs)
            size = sum(float(b.square().sum(dtype=torch.float64)) for b in self._expected)
            if not error <= self._tolerance**2 * size:
                return False
        return True


def _default_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    free = available_memory()
    return CPU_GRAPH_MEMORY if free is None else min(CPU_GRAPH_MEMORY, free // 2)


def _num_elements(batch: Batch) -> int:
    return sum(leaf.numel() for leaf in leaves_of(batch) if isinstance(leaf, Tensor))


def _shape(batch: Batch) -> tuple[object, ...]:
    return tuple((leaf.shape, leaf.dtype, leaf.stride()) for leaf in leaves_of(batch) if isinstance(leaf, Tensor))


@contextmanager
def _replayed(device: torch.device, seed: int) -> Iterator[None]:
    """The same torch random numbers each time, and the generators as they were afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield

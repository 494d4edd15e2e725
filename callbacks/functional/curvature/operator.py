"""The Hessian of a mean loss as a linear operator: exact products by double backward (Pearlmutter 1994)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from moe_heads.callbacks.functional.common.batches import Batch, LossFn, batch_size, leaves_of
from moe_heads.callbacks.functional.common.microbatches import Microbatches, free_memory, unless_out_of_memory
from moe_heads.callbacks.functional.common.monitor import Monitor
from moe_heads.callbacks.functional.curvature.loss_graph import (
    checked_loss,
    gradient_with_graph,
    saved_bytes,
    second_order_errors,
)
from moe_heads.callbacks.functional.curvature.parameters import selected_parameters

__all__ = ["CPU_GRAPH_MEMORY", "HessianOperator", "SymmetricOperator"]

CPU_GRAPH_MEMORY = 2 * 2**30
"""Bytes of first-order graph kept between products on a CPU unless the caller says otherwise."""


class SymmetricOperator(Protocol):
    """A real symmetric matrix, known only by its products with vectors of ``dtype`` on ``device``."""

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the vectors."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        ...

    def matvec(self, vector: Tensor) -> Tensor:
        """Product with a vector of shape (P,)."""
        ...


class HessianOperator:
    r"""The Hessian :math:`H = \nabla^2_\theta \frac{1}{N} \sum_i \ell_i(\theta)` of a loss, as products with vectors.

    The batches are weighted by their number of samples, so uneven batches give the Hessian of one large batch. The
    products are exact up to rounding. A parameter that no sample reaches (an idle expert) has a zero row.

    A product costs about four gradients when the first-order graph is rebuilt, 2.4 when it is kept in memory. It is
    kept when a measurement on the first batch says that the graphs of all batches fit into ``graph_memory``. Where
    memory runs out all the same, the graphs are given up, then the batches halved: the product stays the same.

    The model is used as it is found: call inside `analysis_mode`, and do not change the model between products. Layers
    that draw random numbers draw the same ones in every product.

    Args:
        model: The model; its parameters are neither changed nor given a ``.grad``.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch.
        batches: The data. All of it is held on the device of the parameters.
        params: The parameters :math:`\theta`; by default all that require a gradient, in the order of
            ``model.named_parameters()``.
        graph_memory: Bytes that kept graphs may take; by default 2 GiB on a CPU and half of the free memory on a GPU.
        monitor: Looked at before each batch.

    Attributes:
        names: Names of the parameters, in the order of the flat vector.
        slices: Place of each parameter in the flat vector, by name.
        num_samples: N.
        num_products: Products so far.
        mode: "kept" or "rebuilt", what happens to the first-order graph between two products.

    Raises:
        ValueError: If there is nothing to differentiate, the parameters are not all float32 or all float64 on one
            device, the data is empty, the loss is not a finite scalar that depends on the parameters, or the model uses
            reentrant checkpointing.
        RuntimeError: If a custom autograd function of the model is marked once_differentiable.

    Example:
        >>> import torch
        >>> from moe_heads.callbacks.functional.curvature import HessianOperator
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> hessian = HessianOperator(model, lambda m, batch: m(batch).square().mean(), [x[:1], x[1:]])
        >>> hessian.matvec(torch.tensor([1.0, 1.0]))  # of the mean of w1^2 and 4 w2^2
        tensor([1., 4.])
    """

    mode: Literal["kept", "rebuilt"]

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Batch],
        params: Sequence[Tensor] | None = None,
        *,
        graph_memory: int | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        named = selected_parameters(model, params)
        self.names = tuple(named)
        self.params = tuple(named.values())
        self.dtype = self.params[0].dtype
        self.device = self.params[0].device
        ends = torch.tensor([p.numel() for p in self.params]).cumsum(0).tolist()
        self.slices = {name: slice(end - named[name].numel(), end) for name, end in zip(named, ends, strict=True)}
        self.num_parameters: int = ends[-1]
        self._model, self._loss_fn = model, loss_fn
        self._monitor = monitor or Monitor()
        self._data = Microbatches(batches, self.device, self._monitor)
        self._total: Callable[[Tensor], Tensor] | None = None  # this process alone
        self.num_samples = self._data.num_samples
        self.num_products = 0
        self._kept = unless_out_of_memory(lambda: self._graphs(graph_memory))
        self.mode = "rebuilt" if self._kept is None else "kept"

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.num_parameters, self.num_parameters

    def over_ranks(self, total: Callable[[Tensor], Tensor], num_samples: int) -> None:
        """From now on multiply with the Hessian of all ranks' samples.

        Args:
            total: The sum of ``sample_sum(v)`` over the ranks; see `Ranks.led`.
            num_samples: Samples of all ranks.
        """
        self._total, self.num_samples = total, num_samples

    def release(self) -> None:
        """Let go of the graphs that were kept and of the other ranks; a further product would build the graphs anew."""
        self._kept = self._total = None

    def matvec(self, vector: Tensor) -> Tensor:
        """Product :math:`Hv`.

        Args:
            vector: v, shape (P,), in the order of ``names``.

        Returns:
            Hv, shape (P,), dtype of the parameters.

        Raises:
            ValueError: If ``vector`` has another shape, or the product is not finite.
            RuntimeError: If a layer has no second derivative.
        """
        if vector.shape != (self.num_parameters,):
            raise ValueError(f"vector: expected shape ({self.num_parameters},); got {tuple(vector.shape)}")
        total = self._total or self.sample_sum
        product = total(vector.to(self.device, self.dtype)) / self.num_samples
        if not bool(product.isfinite().all()):
            raise ValueError("loss_fn: expected a loss with finite second derivatives; got nan or inf in a product Hv")
        self.num_products += 1
        return product

    def sample_sum(self, vector: Tensor) -> Tensor:
        r""":math:`\sum_i \nabla^2 \ell_i v` over the samples of this process, shape (P,)."""
        parts = [vector[self.slices[name]].view_as(p) for name, p in zip(self.names, self.params, strict=True)]
        kept = self._kept
        if kept is not None:
            product = unless_out_of_memory(partial(self._sum_of_kept, parts, kept))
            if product is not None:
                return product
            del kept
            self._kept, self.mode = None, "rebuilt"
            free_memory()
        return self._summed(
            self._data.evaluate(lambda index, batch: self._differentiated(self._gradient(index, batch), parts))
        )

    def _sum_of_kept(self, parts: list[Tensor], kept: list[tuple[int, tuple[Tensor, ...]]]) -> Tensor:
        def products() -> Iterator[tuple[int, Tensor]]:
            for size, gradient in kept:
                self._monitor.tick()
                yield size, self._differentiated(gradient, parts)

        return self._summed(products())

    def _summed(self, products: Iterable[tuple[int, Tensor]]) -> Tensor:
        total = torch.zeros(self.num_parameters, dtype=self.dtype, device=self.device)
        for size, product in products:
            total.add_(product, alpha=size)
        return total

    def _gradient(self, index: int, batch: Batch) -> tuple[Tensor, ...]:
        """Gradient of a batch's mean loss, with its graph."""
        with _replayed(self.device, seed=index):
            loss = checked_loss(self._loss_fn(self._model, batch), index)
        return gradient_with_graph(loss, self.params)

    def _differentiated(self, gradient: tuple[Tensor, ...], parts: list[Tensor]) -> Tensor:
        # A gradient without a graph is constant (an unused or a linear parameter): its derivative is zero.
        curved = [(g, part) for g, part in zip(gradient, parts, strict=True) if g.requires_grad]
        if not curved:
            return torch.zeros(self.num_parameters, dtype=self.dtype, device=self.device)
        outputs, tangents = zip(*curved, strict=True)
        with second_order_errors():
            rows = torch.autograd.grad(
                outputs,
                self.params,
                tangents,
                retain_graph=self._kept is not None,
                allow_unused=True,
                materialize_grads=True,
            )
        return torch.cat([row.reshape(-1) for row in rows])

    def _graphs(self, graph_memory: int | None) -> list[tuple[int, tuple[Tensor, ...]]] | None:
        """Sizes and gradients of all batches with their graphs; None when they would not fit."""
        if not self._graphs_fit(graph_memory):
            return None
        return [(batch_size(batch), self._gradient(index, batch)) for index, batch in enumerate(self._data)]

    def _graphs_fit(self, graph_memory: int | None) -> bool:
        """Whether the graphs of all batches fit, judged by the first batch and the sizes of the others."""
        if graph_memory is None:
            on_gpu = self.device.type == "cuda"
            graph_memory = torch.cuda.mem_get_info(self.device)[0] // 2 if on_gpu else CPU_GRAPH_MEMORY
        # Each batch's gradient is held as well. Most of the time this alone tells for a large model.
        gradients = len(self._data) * sum(p.numel() * p.element_size() for p in self.params)
        if gradients > graph_memory:
            return False
        first, *_ = self._data
        # The graph measured is thrown away: under the measuring hooks autograd does not notice in-place changes.
        held = saved_bytes(lambda: self._gradient(0, first), besides=self._model.parameters())
        elements = [_num_elements(batch) for batch in self._data]
        return gradients + held * sum(elements) / max(elements[0], 1) <= graph_memory


def _num_elements(batch: Batch) -> int:
    return sum(leaf.numel() for leaf in leaves_of(batch) if isinstance(leaf, Tensor))


@contextmanager
def _replayed(device: torch.device, seed: int) -> Iterator[None]:
    """The same torch random numbers each time, and the generators as they were afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield

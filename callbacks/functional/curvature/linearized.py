"""Hessian-vector products by forward over reverse mode, traced once, with all that is constant computed beforehand.

The derivative of the gradient in a direction v is linear in v. Traced as a graph of tensor operations it falls into
four parts: what depends on the weights alone, on the batch, on v, and on both. The last two run for every product, the
last for each batch of it: two gradients' worth of arithmetic, instead of three.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from moe_heads.callbacks.functional.common.batches import Batch, LossFn, leaves_of, map_leaves
from moe_heads.callbacks.functional.curvature.partition import (
    merge_equal,
    refuse_dynamic_sizes,
    reuse_memory,
    split_by_inputs,
)

__all__ = ["BoundGradient", "LinearizedGradient", "form_of"]


class LinearizedGradient:
    """The directional derivative of the gradient of a loss, as a program that holds for all batches of one form.

    Args:
        model: The model.
        loss_fn: The loss.
        params: The parameters to differentiate by, by name.
        batch: A batch of the form.

    Attributes:
        form: The form; see `form_of`.

    Raises:
        ValueError: If the loss reaches the parameters other than through the model's modules, or an operation has a
            result whose size depends on the values in the batch.
        Exception: Whatever torch says of an operation that it cannot trace or has no forward derivative for.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, params: dict[str, Tensor], batch: Batch) -> None:
        self.form = form_of(batch)
        loss = _Loss(model, loss_fn)
        values = {f"model.{name}": p.detach() for name, p in params.items()}

        def value(values: dict[str, Tensor], batch: Batch) -> Tensor:
            return cast(Tensor, torch.func.functional_call(loss, values, (batch,))).reshape(())

        if value(values, batch).requires_grad:
            # a loss that holds the parameters itself, for a penalty say: the program would take them for constants
            raise ValueError("the loss reaches parameters other than through the modules of the model")

        def derivative(*inputs: Tensor) -> list[Tensor]:
            tangents = dict(zip(values, inputs, strict=False))
            leaves = iter(inputs[len(values) :])
            traced = map_leaves(batch, lambda leaf: next(leaves) if isinstance(leaf, Tensor) else leaf)
            gradient = torch.func.grad(value)
            product = torch.func.jvp(lambda values: gradient(values, traced), (values,), (tangents,))[1]
            return list(product.values())

        leaves = _tensors_of(batch)
        with warnings.catch_warnings():
            # torch's own formulas of forward derivatives use torch.jit.script, which torch deprecates
            warnings.simplefilter("ignore")
            graph = make_fx(derivative)(*map(torch.zeros_like, values.values()), *leaves)
        refuse_dynamic_sizes(graph)
        merge_equal(graph)
        per_batch, product = split_by_inputs(graph, range(len(values)))
        shared, self._per_batch = split_by_inputs(per_batch, range(len(leaves)))
        with torch.no_grad():
            self._shared: Sequence[Tensor] = shared()
        # Constants of the weights alone go through the program of the batch as they are.
        passed = _passed_on(self._per_batch, len(self._shared))
        self._of_weights = [self._shared[source] for source in passed.values()]
        self._own = [place for place in range(_num_outputs(self._per_batch)) if place not in passed]
        self._per_vector, self._product = split_by_inputs(product, self._own)
        reuse_memory(self._product)
        self._of_vector: tuple[Sequence[Tensor], Sequence[Tensor]] = [], []

    @torch.no_grad()
    def bind(self, batch: Batch) -> "BoundGradient":
        """Compute what depends on the batch alone."""
        constants = self._per_batch(*self._shared, *_tensors_of(batch))
        own = [constants[place] for place in self._own]
        sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in own}
        return BoundGradient(self, own, sum(sizes.values()))

    @torch.no_grad()
    def product(self, tangents: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        """The derivative in the direction of ``tangents``, at the batch with these constants of its own."""
        if self._of_vector[0] is not tangents:
            # what depends on the direction and the weights is the same for all batches: the first one computes it
            self._of_vector = tangents, self._per_vector(*self._of_weights, *tangents)
        products: Sequence[Tensor] = self._product(*self._of_vector[1], *own)
        return products


@dataclass(frozen=True, eq=False)
class BoundGradient:
    """The derivative of the gradient at one batch.

    Attributes:
        program: Computes it.
        own: What depends on the weights and the batch alone.
        num_bytes: Memory of that.
    """

    program: LinearizedGradient
    own: Sequence[Tensor]
    num_bytes: int

    def __call__(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """The derivative in the direction of ``tangents``, one tensor a parameter; give all batches the same list."""
        return self.program.product(tangents, self.own)


def form_of(batch: Batch) -> Any | None:
    """What batches have in common that a program can be given: containers, keys, and shapes and strides of tensors.

    None for a batch that holds something else than tensors, which a program would take for a constant. Equal forms
    compare as equal.
    """
    if not all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves_of(batch)):
        return None
    return map_leaves(batch, lambda leaf: None if leaf is None else (tuple(leaf.shape), leaf.dtype, leaf.stride()))


def _passed_on(program: fx.GraphModule, num_inputs: int) -> dict[int, int]:
    """By place among the outputs, those of the first inputs that a program returns as they are."""
    inputs = {node: place for place, node in enumerate(program.graph.find_nodes(op="placeholder"))}
    places = enumerate(inputs.get(node, num_inputs) for node in _outputs(program))
    return {place: source for place, source in places if source < num_inputs}


def _num_outputs(program: fx.GraphModule) -> int:
    return len(_outputs(program))


def _outputs(program: fx.GraphModule) -> Sequence[fx.Node]:
    (output,) = program.graph.find_nodes(op="output")
    return cast(Sequence[fx.Node], output.args[0])


class _Loss(nn.Module):
    """The loss as a module, so that the parameters of the model can be replaced while it is computed."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model, self._loss_fn = model, loss_fn

    def forward(self, batch: Batch) -> Tensor:
        return self._loss_fn(self.model, batch)


def _tensors_of(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in leaves_of(batch) if isinstance(leaf, Tensor)]

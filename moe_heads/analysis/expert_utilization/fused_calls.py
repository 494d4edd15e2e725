"""Calls of single experts inside a module that computes all of them, by the conventions of transformers 5.

Shapes: N rows, D features, E experts, K choices of a row.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from moe_heads.analysis.expert_utilization.expert_calls import NUM_COMPARED, ExpertCalls, check_equal
from moe_heads.analysis.expert_utilization.expert_weights import ExpertWeights, UnknownExpertsError

__all__ = ["FusedExperts"]

# Elements of the inputs of all experts together that exist at a time.
_MAX_ELEMENTS = 2**24


class FusedExperts(ExpertCalls):
    """Experts that are one module, called once for all rows of the router.

    Two conventions are known: rows (N, D) with the indices (N, K) and weights (N, K) of their experts, in any order of
    the last two, and rows (E·N, D), block by block the input of the router times the scores of an expert (Llama 4).
    """

    def __init__(self, router: nn.Module, experts: ExpertWeights, num_experts: int, max_rows: int) -> None:
        super().__init__(router, experts, num_experts, max_rows)
        self._call: _Call | None = None
        self._unlike = ""
        self._scores: list[Tensor] = []

    @override
    def clear(self) -> None:
        super().clear()
        self._call, self._unlike, self._scores = None, "", []

    @override
    def _add_hooks(self, stack: ExitStack) -> None:
        super()._add_hooks(stack)
        module = self.experts.module
        stack.callback(self._router.register_forward_hook(self._note_scores).remove)
        stack.callback(module.register_forward_pre_hook(self._note_call, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(self._note_output).remove)

    def _note_scores(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._scores:
            shape = self._num_rows, self.num_experts
            values = output if isinstance(output, (tuple, list)) else (output,)
            fitting = (value for value in values if isinstance(value, Tensor) and value.shape == shape)
            self._scores = [value.detach()[:NUM_COMPARED].clone() for value in fitting]

    def _note_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._call is not None or self._unlike:
            return
        arguments: dict[int | str, Any] = dict((*enumerate(args), *kwargs.items()))
        tensors = {key: value.detach() for key, value in arguments.items() if isinstance(value, Tensor)}
        others = {key: value for key, value in arguments.items() if key not in tensors}
        kinds = _kinds_of(tensors)
        if kinds == {"rows", "index", "weights"}:
            self._call = _IndexedCall(tensors, others, self._max_rows)
        elif kinds == {"rows"} and len(next(iter(tensors.values()))) == self.num_experts * self._num_rows:
            self._call = _BlockCall(tensors, others, self.num_experts)
        else:
            # not raised: the pass of the model has to go on
            shapes = ", ".join(f"{tuple(value.shape)}" for value in tensors.values())
            self._unlike = (
                f"{type(module).__name__} was called with tensors of shapes {shapes}, expected rows, indices and"
                " weights of their experts, or the rows of each expert"
            )

    def _note_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._call is None or self._call.output is not None or not isinstance(output, Tensor):
            return
        if len(output) == self._call.num_rows:
            self._call.note_output(output.detach())

    @override
    def _check_calls(self, rows: Tensor) -> None:
        call, name = self._call, type(self.experts.module).__name__
        if call is None or call.output is None:
            raise UnknownExpertsError(self._unlike or f"{name} returned no output for each row")
        call.check(self, rows, self._num_rows, self._scores)

    @override
    def outputs(self, kept: Tensor) -> Iterator[tuple[int, Tensor]]:
        assert self._call is not None and self._rows is not None
        # the input of the experts, which need not be that of the router: Gemma 4 normalizes it in between
        rows = self._rows if self._call.rows is None else self._call.rows
        yield from self._call.run(self, self.cast(rows[kept.to(rows.device)]))


def _kinds_of(tensors: Mapping[int | str, Tensor]) -> set[str]:
    """Return the kinds of the arguments of a call, or nothing if they are not one of each kind."""
    kinds = [_kind_of(value, number) for number, value in enumerate(tensors.values())]
    return set(kinds) if len(set(kinds)) == len(kinds) and all(v.dim() == 2 for v in tensors.values()) else set()


def _kind_of(value: Tensor, number: int) -> str:
    if not value.is_floating_point():
        return "index"
    return "rows" if number == 0 else "weights"


class _Call(ABC):
    """Start of a recorded call.

    Attributes:
        num_rows: Number of rows of the call.
        rows: Rows that all experts can run on. None if they are those of the router.
        output: Recorded output.
    """

    rows: Tensor | None = None
    output: Tensor | None = None

    def __init__(self, num_rows: int, others: Mapping[int | str, Any]) -> None:
        self.num_rows, self._others = num_rows, others

    @abstractmethod
    def note_output(self, output: Tensor) -> None:
        """Keep the rows of the output that belong to the rows of the call."""

    @abstractmethod
    def check(self, calls: FusedExperts, rows: Tensor, num_rows: int, scores: list[Tensor]) -> None:
        """Check that the recorded call follows the convention.

        Args:
            calls: The experts.
            rows: First rows of the input of the router.
            num_rows: Number of all its rows.
            scores: First rows of the outputs of the router of shape (N, E).
        """

    @abstractmethod
    def run(self, calls: FusedExperts, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield each expert with its output for the rows, or for a part of them."""

    def _forward(self, calls: FusedExperts, tensors: Mapping[int | str, Tensor]) -> Tensor:
        arguments = {**tensors, **self._others}
        positional = [arguments[number] for number in sorted(key for key in arguments if isinstance(key, int))]
        named = {key: value for key, value in arguments.items() if isinstance(key, str)}
        # not the call: hooks of the user would run for rows that the model did not pass
        output = calls.experts.module.forward(*positional, **named)
        assert isinstance(output, Tensor)
        return output


class _IndexedCall(_Call):
    """Call with rows (N, D), indices (N, K) and weights (N, K)."""

    def __init__(self, tensors: Mapping[int | str, Tensor], others: Mapping[int | str, Any], max_rows: int) -> None:
        self._keys = {_kind_of(value, number): key for number, (key, value) in enumerate(tensors.items())}
        super().__init__(len(tensors[self._keys["rows"]]), others)
        self._max_rows = max_rows
        self.rows, self._index, self._weights = (
            tensors[self._keys[kind]][:max_rows].clone() for kind in ("rows", "index", "weights")
        )

    @override
    def note_output(self, output: Tensor) -> None:
        self.output = output[: self._max_rows].clone()

    @override
    def check(self, calls: FusedExperts, rows: Tensor, num_rows: int, scores: list[Tensor]) -> None:
        assert self.output is not None and self.rows is not None
        if self.num_rows != num_rows or self._index.shape != self._weights.shape:
            raise UnknownExpertsError(
                f"{type(calls.experts.module).__name__} was called with {self.num_rows} rows, indices"
                f" {tuple(self._index.shape)} and weights {tuple(self._weights.shape)}, and the router with {num_rows}"
                " rows"
            )
        total = torch.zeros_like(self.output, dtype=torch.promote_types(self.output.dtype, torch.float32))
        for expert, output in self.run(calls, calls.cast(self.rows)):
            weight = torch.where(self._index == expert, self._weights, 0).sum(1, keepdim=True)
            total += torch.where(weight == 0, 0, weight * output)
        check_equal(total, self.output, self.rows, self._weights)

    @override
    def run(self, calls: FusedExperts, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        for expert in range(calls.num_experts):
            chosen = torch.full((len(rows), 1), expert, dtype=self._index.dtype, device=rows.device)
            ones = torch.ones(len(rows), 1, dtype=rows.dtype, device=rows.device)
            values = {"rows": rows, "index": chosen, "weights": ones}
            yield expert, self._forward(calls, {key: values[kind] for kind, key in self._keys.items()})


class _BlockCall(_Call):
    """Call with the rows of each expert, (E·N, D), which are those of the router times its scores."""

    def __init__(self, tensors: Mapping[int | str, Tensor], others: Mapping[int | str, Any], num_experts: int) -> None:
        ((self._key, given),) = tensors.items()
        super().__init__(len(given), others)
        self._num_experts = num_experts
        self._given = self._first_of_blocks(given)

    @override
    def note_output(self, output: Tensor) -> None:
        self.output = self._first_of_blocks(output)

    @override
    def check(self, calls: FusedExperts, rows: Tensor, num_rows: int, scores: list[Tensor]) -> None:
        assert self.output is not None
        first = rows[:NUM_COMPARED].unsqueeze(0)
        for score in scores:
            expected = first * score.t().unsqueeze(-1)
            if torch.allclose(expected.float(), self._given.float(), rtol=torch.finfo(rows.dtype).eps ** 0.5, atol=0):
                break
        else:
            raise UnknownExpertsError(
                f"{type(calls.experts.module).__name__} was called with other rows than those of the router times its"
                " scores"
            )
        again = self._forward(calls, {self._key: calls.cast(self._given).flatten(0, 1)})
        check_equal(again.view(self.output.shape), self.output, self._given)

    @override
    def run(self, calls: FusedExperts, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        size = max(1, _MAX_ELEMENTS // (self._num_experts * rows.shape[1]))
        for part in rows.split(size):
            output = self._forward(calls, {self._key: part.repeat(self._num_experts, 1)})
            yield from enumerate(output.unflatten(0, (self._num_experts, -1)))

    def _first_of_blocks(self, rows: Tensor) -> Tensor:
        return rows.reshape(self._num_experts, -1, rows.shape[-1])[:, :NUM_COMPARED].clone()

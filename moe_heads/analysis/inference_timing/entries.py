"""Entries of a batch that a request has: labels and other entries of the loss stay out of the forward pass."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import BY_NAME, Batch, ForwardFn, call_model, leaves_of
from moe_heads.analysis._shared.copies import own_copy
from moe_heads.analysis.inference_timing.resizing import few_samples

__all__ = ["RequestEntries", "call_request", "request_entries"]

_NO_PARAMETER = "no parameter of forward"
_FOR_LOSS = "for the loss"
_AFTER_FIRST = "not the first entry"


@dataclass(frozen=True)
class RequestEntries:
    """Division of the entries of a batch between the forward pass and the rest.

    Attributes:
        given: Names of the entries that the forward pass gets, places for a tuple or list; None for the whole batch.
        left_out: Reasons for the entries that stay out, by name.
        text: Description of both, for the summary.
    """

    given: tuple[str, ...] | tuple[int, ...] | None
    left_out: Mapping[str, str]
    text: str

    def of(self, batch: Batch) -> Batch:
        """Return the entries of a batch that the forward pass gets."""
        if self.given is None:
            return batch
        entries = _named(batch)
        if entries is None:
            return [batch[place] for place in self.given]
        return {name: entries[name] for name in self.given if name in entries}


def request_entries(model: nn.Module, batch: Batch, forward_fn: ForwardFn) -> RequestEntries:
    """Find the entries of a batch that a request has.

    A custom ``forward_fn`` gets the whole batch, and decides itself. Otherwise the entries of a mapping or dataclass
    that match a parameter of ``forward`` are passed, except those of the loss: entries with "label" in their name, as
    in transformers, and optional ones without which the output loses a scalar, its loss. A label that changes the rest
    of the output is a condition and no label, and stays in.

    Args:
        model: The model, in evaluation mode.
        batch: A batch on its device.
        forward_fn: The function that runs the model.

    Raises:
        ValueError: If the model gives no output without its labels.
    """
    entries = _named(batch)
    if forward_fn is not call_model:
        return RequestEntries(None, {}, "forward_fn gets the whole batch")
    if entries is None:
        num_others = len(batch) - 1 if isinstance(batch, (tuple, list)) else 0
        if num_others < 1:
            return RequestEntries(None, {}, "the whole batch went in")
        text = f"the first entry of each batch went in, {num_others} other{'s' * (num_others > 1)} stayed out"
        return RequestEntries((0,), {f"[{place}]": _AFTER_FIRST for place in range(1, len(batch))}, text)
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        given, left_out = _Probe(model, few_samples(batch)).division()
    parts = [f"{', '.join(given) or 'nothing'} went in"]
    for reason in dict.fromkeys(left_out.values()):
        names = ", ".join(name for name, why in left_out.items() if why == reason)
        parts.append(f"{names} stayed out ({reason})")
    return RequestEntries(tuple(given), left_out, "; ".join(parts))


def call_request(model: Callable[..., Any], batch: Batch) -> Any:
    """Call the model with the entries that `RequestEntries.of` returned, in place of `call_model`.

    The signature of the model is not inspected again, since this function is timed.
    """
    if isinstance(batch, dict):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


class _Probe:
    """Runs of a model with and without some entries of a small batch."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self._model, named = model, _named(batch)
        assert named is not None
        self._entries = named
        parameters = inspect.signature(model.forward).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._by_name = {p.name: p for p in parameters if p.kind in BY_NAME}

    def division(self) -> tuple[list[str], dict[str, str]]:
        """Return the entries of a request, and the reasons for the others."""
        fitting = [name for name in self._entries if self._takes_all or name in self._by_name]
        left_out = dict.fromkeys([name for name in self._entries if name not in fitting], _NO_PARAMETER)
        labels = self._labels_of(fitting)
        given = [name for name in fitting if name not in labels]
        losses = [*labels, *self._scalar_makers(given)]
        self._check_output([name for name in fitting if name not in losses], fitting, losses)
        given = [name for name in fitting if name not in losses]
        return given, left_out | dict.fromkeys(losses, _FOR_LOSS)

    def _labels_of(self, fitting: list[str]) -> list[str]:
        """Return the entries with the name of a label, none if they change the rest of the output."""
        labels = [name for name in fitting if "label" in name.lower() and self._entries[name] is not None]
        if not labels:
            return []
        with_labels = self._run(fitting)
        without = self._run([name for name in fitting if name not in labels])
        return [] if _is_condition(with_labels, without) else labels

    def _scalar_makers(self, given: list[str]) -> list[str]:
        """Return the optional entries without which the output has fewer scalars."""
        optional = [name for name in given if self._is_optional(name)]
        base = self._run(given) if optional else None
        num_scalars = _num_scalars(base)
        if not num_scalars:
            return []
        found = []
        for name in optional:
            without = self._run([other for other in given if other != name])
            if without is not None and _num_scalars(without) < num_scalars:
                found.append(name)
        return found

    def _check_output(self, given: list[str], fitting: list[str], losses: list[str]) -> None:
        if not losses or self._run(given):
            return
        error = self._error.partition(" Pass forward_fn")[0].rstrip(".")  # the remedy follows
        reason = f", got {error}" if error else ", got one that returns no tensor"
        if not self._run(fitting):
            return  # the batch itself does not fit: the sweep raises the error
        raise ValueError(
            f"example_batch: expected a model that gives an output without {', '.join(map(repr, losses))}{reason}."
            f" {type(self._model).__name__} needs its labels. Pass forward_fn=lambda model, batch: ... with the call of"
            " a request."
        )

    def _is_optional(self, name: str) -> bool:
        parameter, value = self._by_name.get(name), self._entries[name]
        is_optional = parameter is None or parameter.default is not parameter.empty
        return is_optional and (isinstance(value, Tensor) or value is True)

    def _run(self, names: list[str]) -> list[Tensor] | None:
        """Return the tensors of the output for some entries; None if the model raises an error."""
        torch.manual_seed(0)
        self._error = ""
        try:
            output = call_model(self._model, own_copy({name: self._entries[name] for name in names}))
        except Exception as error:  # of any kind: this is code of the user
            lines = str(error).splitlines() or [""]
            self._error = f"{type(error).__name__}: {lines[0]}"
            return None
        return [leaf for leaf in leaves_of(output) if isinstance(leaf, Tensor)]


def _named(batch: Batch) -> dict[str, Any] | None:
    """Return the entries of a mapping or dataclass by name; None for other batches."""
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return dict(batch) if isinstance(batch, Mapping) else None


def _num_scalars(tensors: list[Tensor] | None) -> int:
    return sum(tensor.dim() == 0 and tensor.is_floating_point() for tensor in tensors or [])


def _is_condition(with_labels: list[Tensor] | None, without: list[Tensor] | None) -> bool:
    """Return whether labels change an output, and add none: those of a generator do, those of a loss do not."""
    if not with_labels or not without or len(with_labels) != len(without):
        return False
    return not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(with_labels, without, strict=True))

"""What is timed at a batch size: the whole, its modules, and beside each head with a router its stages and its twin."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn

from moe_heads.analysis._shared.batches import Batch, ForwardFn
from moe_heads.analysis._shared.microbatches import is_out_of_memory
from moe_heads.analysis._shared.progress import TimeUp
from moe_heads.analysis.inference_timing.calls import MODEL, Call, InTurn, call_of_model
from moe_heads.analysis.inference_timing.capture import Captured, capture
from moe_heads.analysis.inference_timing.counting import Recorder
from moe_heads.analysis.inference_timing.failures import first_line
from moe_heads.analysis.inference_timing.heads import part_name, routed_heads, stages_of, twin_name
from moe_heads.analysis.inference_timing.resize import resized
from moe_heads.analysis.inference_timing.row import Skipped
from moe_heads.head import Head

__all__ = ["RefusedError", "Subject", "Taken"]


class RefusedError(Exception):
    """A forward pass that failed.

    Args:
        error: Why.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


@dataclass(frozen=True)
class Taken:
    """A batch size that the model took.

    Attributes:
        calls: What can be timed, by the name of its rows.
        captured: What one pass showed.
        seconds: Duration of that pass.
        skipped: What of it cannot be timed or counted.
    """

    calls: Mapping[str, Call]
    captured: Captured
    seconds: float
    skipped: Sequence[Skipped]


@dataclass(frozen=True)
class Subject:
    """What is timed.

    Attributes:
        model: The model.
        example: A batch on the model's device.
        forward_fn: Runs the whole model.
        named: Modules to time by themselves.
        is_required: Whether each of them has to run in the forward pass; if so, they are all that is timed apart.
        device: Where the model is.
        twins: Dense heads beside those with a router that are timed apart, by the name of the head.
    """

    model: nn.Module
    example: Batch
    forward_fn: ForwardFn
    named: Mapping[str, nn.Module]
    is_required: bool
    device: torch.device
    twins: Mapping[str, Head] = field(default_factory=dict)

    @cached_property
    def all_heads(self) -> dict[str, Head]:
        """The heads with a router, timed or not: their arithmetic is that of the experts that they choose."""
        return routed_heads(self.model)

    @cached_property
    def heads(self) -> dict[str, Head]:
        """Those that are timed apart; the model may be one itself."""
        timed = set(self.named) if self.is_required else {MODEL, *self.named}
        return {name: head for name, head in self.all_heads.items() if name in timed}

    @cached_property
    def twin_names(self) -> dict[str, str]:
        """Names of the rows of the dense twins, by the name of the head."""
        return {head: twin_name(head, self.named) for head in self.twins}

    def take(self, size: int) -> Taken:
        """Run a batch size once.

        Args:
            size: Samples of the batch.

        Raises:
            RefusedError: If the forward pass fails.
            ValueError: If a module that was asked for does not run in it.
        """
        start, skipped = time.perf_counter(), list[Skipped]()
        try:
            captured = self._captured(size, Recorder())
        except RefusedError as refused:
            if is_out_of_memory(refused.error):
                raise
            # it may have been the recorder that it does not run with
            captured = self._captured(size, None)
            reason = f"FLOPs: its operators cannot be recorded, {first_line(refused.error)}"
            skipped.append(Skipped(size, None, None, reason))
        seconds = time.perf_counter() - start
        idle = [name for name in self.named if name not in captured.calls]
        if idle and self.is_required:
            raise ValueError(f"modules: expected modules that run in the forward pass; {idle} do not")
        return Taken(self._with_heads(size, captured, skipped), captured, seconds, skipped)

    def _captured(self, size: int, recorder: Recorder | None) -> Captured:
        forward = call_of_model(self.forward_fn, self.model, resized(self.example, size))
        try:
            return capture(forward, self.model, {**self.all_heads, **self.named}, recorder)
        except TimeUp:
            raise
        except Exception as error:
            # the user's model and function raise what they like
            raise RefusedError(error) from error

    def _with_heads(self, size: int, captured: Captured, skipped: list[Skipped]) -> dict[str, Call]:
        known = captured.calls
        found = {MODEL: captured.forward, **{name: known[name] for name in self.named if name in known}}
        for name, head in self.heads.items():
            if name not in known:
                continue
            found |= {part_name(name, stage): run for stage, run in stages_of(head, known[name]).items()}
            if name in self.twins:
                try:
                    found[self.twin_names[name]] = self._of_twin(name, captured)
                except Exception as error:
                    # forward_fn raises what it likes where it needs what a dense head has not
                    skipped.append(Skipped(size, None, self.twin_names[name], first_line(error)))
        return found

    def _of_twin(self, head: str, captured: Captured) -> Call:
        """The call of the dense twin, by the way that the head itself is called."""
        twin, call = self.twins[head], captured.calls[head]
        if head != MODEL:
            return replace(call, function=InTurn(twin) if isinstance(call.function, InTurn) else twin)
        whole = replace(captured.forward, args=(twin, *captured.forward.args[1:]))
        whole()
        whole.renew()
        return whole

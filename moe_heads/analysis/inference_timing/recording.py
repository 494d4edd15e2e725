"""Record of one forward pass: the inputs of its modules, their operators, and the tensors that they modify."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import leaves_of, map_leaves
from moe_heads.analysis.inference_timing.calls import MODEL, Call
from moe_heads.analysis.inference_timing.flops import Operator, OperatorLog, OperatorRecorder
from moe_heads.analysis.inference_timing.rows import Skipped

__all__ = ["Capture", "recorded"]


@dataclass
class Capture:
    """One recorded forward pass with its duration, and what of it cannot be timed or counted.

    Attributes:
        modules: The calls of each recorded module, merged into one, by row name.
        operators: Operators of the whole pass and of each module, by row name; empty if they were not recorded.
    """

    forward: Call
    modules: Mapping[str, Call]
    operators: Mapping[str, OperatorLog]
    seconds: float = 0.0
    skipped: list[Skipped] = field(default_factory=list)


def recorded(forward: Call, named: Mapping[str, nn.Module], recorder: OperatorRecorder | None) -> Capture:
    """Run a forward pass once and record the inputs of its modules, and their operators if there is a recorder."""
    before = map_leaves(forward.arguments, _cloned)
    recordings = {name: _Recording(recorder) for name in named}
    with ExitStack() as stack:
        for name, module in named.items():
            hooks = recordings[name]
            stack.callback(module.register_forward_pre_hook(hooks.enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(hooks.leave, with_kwargs=True, always_call=True).remove)
        # the hooks would make a compiled model recompile twice
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if recorder is not None:
            stack.enter_context(recorder)
        forward()
    forward = replace(forward, overwritten=_changes(before, forward.arguments))
    forward.restore_inputs()
    ran = {name: recording for name, recording in recordings.items() if recording.arguments}
    modules = {name: Call(named[name], tuple(r.arguments), r.overwritten) for name, r in ran.items()}
    if recorder is None:
        return Capture(forward, modules, {})
    logs = {name: OperatorLog(tuple(recording.operators)) for name, recording in ran.items()}
    return Capture(forward, modules, {**logs, MODEL: OperatorLog(tuple(recorder.operators))})


class _Recording:
    """Forward hooks that record the outermost calls of one module."""

    def __init__(self, recorder: OperatorRecorder | None) -> None:
        self.arguments: list[Any] = []
        self.overwritten: dict[int, Tensor] = {}
        self.operators: list[Operator] = []
        self._recorder = recorder or OperatorRecorder()
        self._depth = self._start = 0

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth == 1:
            with self._recorder.paused():
                # a copy, because a later layer may modify the input in place
                self.arguments.append(map_leaves((args, kwargs), _cloned))
            self._start = len(self._recorder.operators)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.operators += self._recorder.operators[self._start :]
            with self._recorder.paused():
                *earlier, last = self.arguments
                start, changes = len(leaves_of(earlier)), _changes(last, (args, kwargs))
                self.overwritten |= {start + index: original for index, original in changes.items()}


def _cloned(leaf: object) -> object:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _changes(before: Any, after: Any) -> dict[int, Tensor]:
    """Return the original values of the tensors that a run modified, by index among the leaves of its arguments."""
    pairs = zip(leaves_of(before), leaves_of(after), strict=False)
    return {
        index: original.clone()
        for index, (original, now) in enumerate(pairs)
        if isinstance(original, Tensor) and isinstance(now, Tensor) and not _is_same(original, now)
    }


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal, where nan equals nan."""
    if a.shape != b.shape or not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    return bool(((a == b) | (a.isnan() & b.isnan())).all())

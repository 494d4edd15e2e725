"""One forward pass that shows what there is to time: the inputs of the modules, the operators, and the memory."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import leaves_of, map_leaves
from moe_heads.analysis.inference_timing.calls import MODEL, Call, in_turn
from moe_heads.analysis.inference_timing.counting import Counted, Recorder
from moe_heads.analysis.inference_timing.live_memory import num_bytes

__all__ = ["Captured", "capture"]


@dataclass
class Captured:
    """What one forward pass showed.

    Attributes:
        forward: The forward pass, which knows now what it writes into.
        calls: All calls of each module, on the inputs that they had.
        counted: The operators of the whole, and of all calls of each module; empty if they were not recorded.
        num_bytes: Most bytes that its tensors held at once, with the kept inputs; 0 if that was not recorded.
    """

    forward: Call
    calls: dict[str, Call]
    counted: Mapping[str, Counted]
    num_bytes: int


def capture(forward: Call, model: nn.Module, named: Mapping[str, nn.Module], recorder: Recorder | None) -> Captured:
    """Run the forward pass once and keep the inputs of the modules.

    Args:
        forward: The forward pass.
        model: The model.
        named: Its modules whose inputs are kept, by name.
        recorder: Records the operators; None to run without.
    """
    before = replace(forward, args=map_leaves(forward.args, _cloned))
    watch = _Watch(recorder)
    with ExitStack() as stack:
        for name, module in named.items():
            stack.callback(module.register_forward_pre_hook(partial(watch.enter, name), with_kwargs=True).remove)
            stack.callback(
                module.register_forward_hook(partial(watch.leave, name), with_kwargs=True, always_call=True).remove
            )
        # a model that is compiled would be so anew for the hooks, and once more without them
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if recorder is not None:
            stack.enter_context(recorder)
        forward()
    forward = replace(forward, written=_changes(before, forward.args, forward.kwargs))
    forward.renew()
    calls = {name: in_turn(watch.calls[name]) for name in named if name in watch.calls}
    if recorder is None:
        return Captured(forward, calls, {}, 0)
    counted = {name: watch.counted(name) for name in calls}
    counted[MODEL] = Counted(tuple(recorder.operators))
    kept = [leaf for call in (forward, *calls.values()) for leaf in leaves_of([call.args, dict(call.kwargs)])]
    return Captured(
        forward,
        calls,
        counted,
        recorder.memory.peak + sum(num_bytes(leaf) for leaf in kept if isinstance(leaf, Tensor)),
    )


@dataclass
class _Watch:
    """Notes the calls of modules, those inside a call of the same module aside."""

    recorder: Recorder | None
    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    _depths: Counter[str] = field(default_factory=Counter)
    _ranges: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    _start: dict[str, int] = field(default_factory=dict)

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depths[name] += 1
        if self._depths[name] > 1:
            return
        with self._unrecorded():
            # a copy: a later layer may work in place
            self.calls[name].append(Call(module, *map_leaves((args, kwargs), _cloned)))
        self._start[name] = self._num_operators()

    def leave(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
    ) -> None:
        self._depths[name] -= 1
        if self._depths[name]:
            return
        self._ranges[name].append((self._start[name], self._num_operators()))
        with self._unrecorded():
            call = self.calls[name][-1]
            self.calls[name][-1] = replace(call, written=_changes(call, args, kwargs))

    def counted(self, name: str) -> Counted:
        assert self.recorder is not None
        operators = self.recorder.operators
        return Counted(tuple(op for start, stop in self._ranges[name] for op in operators[start:stop]))

    def _num_operators(self) -> int:
        return 0 if self.recorder is None else len(self.recorder.operators)

    def _unrecorded(self) -> ExitStack:
        stack = ExitStack()
        if self.recorder is not None:
            stack.enter_context(self.recorder.paused())
        return stack


def _cloned(leaf: object) -> object:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _changes(before: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int, Tensor]:
    """What the tensors held that a run has changed, by their place among the leaves of the arguments."""
    pairs = zip(leaves_of([before.args, dict(before.kwargs)]), leaves_of([args, dict(kwargs)]), strict=False)
    return {
        index: kept.clone()
        for index, (kept, now) in enumerate(pairs)
        if isinstance(kept, Tensor) and isinstance(now, Tensor) and not _is_same(kept, now)
    }


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same, a nan being as good as another."""
    if a.shape != b.shape or not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    return bool(((a == b) | (a.isnan() & b.isnan())).all())

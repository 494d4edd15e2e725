"""Calls to time of a model, from one recorded forward pass at a batch size."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from moe_heads.analysis._shared.batches import Batch, ForwardFn
from moe_heads.analysis._shared.copies import own_copy
from moe_heads.analysis._shared.microbatches import is_out_of_memory
from moe_heads.analysis._shared.progress import TimeUp
from moe_heads.analysis.inference_timing.calls import MODEL, Call, RowMode
from moe_heads.analysis.inference_timing.compilation import Compilation
from moe_heads.analysis.inference_timing.flops import FlopCount, OperatorRecorder
from moe_heads.analysis.inference_timing.measure import first_line
from moe_heads.analysis.inference_timing.recording import Capture, recorded
from moe_heads.analysis.inference_timing.requests import Requests
from moe_heads.analysis.inference_timing.rows import Skipped
from moe_heads.analysis.inference_timing.stages import (
    STAGES,
    active_flops,
    part_name,
    routed_heads,
    row_name,
    stages_of,
)
from moe_heads.routed_module import RoutedModule
from moe_heads.routing import Router

__all__ = ["TimedModel", "named_modules"]


@dataclass(frozen=True)
class TimedModel:
    """A model with its requests, and the modules and heads to time.

    Attributes:
        named: Modules to time alone, by row name.
        is_required: True if each of these has to run in the forward pass, and no other head is divided.
        twins: Dense twins of the timed heads with a router, by the name of the head.
        compilation: What runs compiled in the given model, of which ``model`` is a copy; None if nothing does.
    """

    model: nn.Module
    requests: Requests
    forward_fn: ForwardFn
    named: Mapping[str, nn.Module]
    is_required: bool
    device: torch.device
    twins: Mapping[str, RoutedModule] = field(default_factory=dict)
    compilation: Compilation | None = None

    @cached_property
    def all_heads(self) -> dict[str, RoutedModule]:
        """All heads with a router, timed or not: their operations are those of the chosen experts."""
        return routed_heads(self.model)

    @cached_property
    def heads(self) -> dict[str, RoutedModule]:
        """The heads with a router that are timed, which may include the model."""
        timed = set(self.named) if self.is_required else {MODEL, *self.named}
        return {name: head for name, head in self.all_heads.items() if name in timed}

    def twin_name(self, head: str) -> str:
        """Return the row name of the dense twin of a head, different from those of the named modules."""
        name = f"{head}_dense"
        while name in self.named:
            name += "_"
        return name

    def mode_of(self, row: str) -> RowMode:
        """Return the mode in which the call of a row runs in the given model."""
        if self.compilation is None:
            return "eager"
        mode = self.compilation.mode_of(self._paths[row])
        is_twin = row in map(self.twin_name, self.twins)
        return "eager" if is_twin and mode != "compiled" else mode

    def as_given(self, row: str, call: Call, form: Any) -> Call:
        """Return the call of a row with what is compiled in the given model."""
        assert self.compilation is not None
        return self.compilation.as_given(self._paths[row], call, form)

    @cached_property
    def _paths(self) -> dict[str, str]:
        """Dotted names of the modules by row name; stages and twins have the name of their head."""
        paths = {row_name(name): name for name, _ in self.model.named_modules()}
        parts = {part_name(head, stage): paths[head] for head in self.all_heads for stage in STAGES}
        return {**parts, **{self.twin_name(head): paths[head] for head in self.twins}, **paths}

    def capture(self, size: int, batch: Batch) -> Capture:
        """Run a batch of ``size`` samples once and record the modules. Errors of the forward pass propagate."""
        start, skipped = time.perf_counter(), []
        try:
            captured = self._recorded(batch, OperatorRecorder())
        except TimeUp:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # some models fail only under a dispatch mode
            captured = self._recorded(batch, None)
            reason = f"FLOPs: its operators cannot be recorded, {first_line(error)}"
            skipped.append(Skipped(size, None, None, reason))
        return replace(captured, seconds=time.perf_counter() - start, skipped=skipped)

    def calls(self, size: int, captured: Capture) -> dict[str, Call]:
        """Return the calls to time by row name: the model, its modules, and the stages and twins of its heads.

        Raises:
            ValueError: If a required module did not run in the forward pass.
        """
        modules = captured.modules
        idle = [name for name in self.named if name not in modules]
        if idle and self.is_required:
            raise ValueError(f"modules: expected modules that run in the forward pass, got {idle}")
        calls = {MODEL: captured.forward, **{name: modules[name] for name in self.named if name in modules}}
        for name, head in self.heads.items():
            if name not in modules:
                continue
            calls |= {part_name(name, stage): call for stage, call in stages_of(head, modules[name]).items()}
            if name in self.twins:
                try:
                    calls[self.twin_name(name)] = self._twin_call(name, captured)
                except Exception as error:
                    # forward_fn may use attributes that a dense head lacks
                    captured.skipped.append(Skipped(size, None, self.twin_name(name), first_line(error)))
        return calls

    def flops(self, captured: Capture) -> dict[str, FlopCount]:
        """Return the operations by row name: recorded ones, but those of a routed head and its twin by formula.

        A sparse head may run more experts than it chooses. A module that contains one counts the chosen experts.
        """
        operators, modules = captured.operators, captured.modules
        chosen = {name: active_flops(head, modules[name]) for name, head in self.all_heads.items() if name in modules}
        counts = {}
        for name, log in operators.items():
            inside = [head for head in chosen if name == MODEL or head == name or head.startswith(f"{name}.")]
            outside = log.flops - sum(operators[head].flops for head in inside)
            num_hidden = log.num_hidden - sum(operators[head].num_hidden for head in inside)
            counts[name] = FlopCount(outside + sum(chosen[head] for head in inside), num_hidden == 0)
        counts |= {name: FlopCount(flops) for name, flops in chosen.items()}
        return counts | {
            self.twin_name(name): FlopCount(active_flops(twin, modules[name]))
            for name, twin in self.twins.items()
            if name in modules
        }

    def _recorded(self, batch: Batch, recorder: OperatorRecorder | None) -> Capture:
        forward = Call(self.forward_fn, (((self.model, own_copy(batch)), {}),))
        return recorded(forward, {**self.all_heads, **self.named}, recorder)

    def _twin_call(self, head: str, captured: Capture) -> Call:
        """Return the call of the dense twin, with the arguments of the head."""
        twin = self.twins[head]
        if head != MODEL:
            return replace(captured.modules[head], function=twin)
        (((_, batch), _),) = captured.forward.arguments
        whole = replace(captured.forward, arguments=(((twin, batch), {}),))
        whole()
        whole.restore_inputs()
        return whole


def named_modules(model: nn.Module, names: Sequence[str] | None) -> tuple[dict[str, nn.Module], list[str]]:
    """Return the modules to time besides the whole model, by row name, and those that TorchScript compiled.

    Args:
        model: The model.
        names: Dotted names; by default "backbone" and "head", all modules that own a router, and these routers.

    Raises:
        ValueError: If a given name is unknown or belongs to a module compiled by TorchScript.
    """
    inside = {name: module for name, module in model.named_modules() if name}
    routers = {name for name, module in inside.items() if isinstance(module, Router)}
    defaults = {"backbone", "head"} | routers | {name.rpartition(".")[0] for name in routers}
    # torch.compile wraps modules, and a copy without the wrappers is timed
    wanted = [name for name in inside if name in defaults] if names is None else [_unwrapped(n, inside) for n in names]
    unknown = [name for name in wanted if name not in inside]
    if unknown:
        raise ValueError(f"modules: expected names of modules, such as {next(iter(inside), None)!r}, got {unknown}")
    scripted = [name for name in wanted if isinstance(inside[name], torch.jit.ScriptModule)]
    if scripted and names is not None:
        raise ValueError(f"modules: expected modules that TorchScript did not compile, got {scripted}")
    return {row_name(name): inside[name] for name in wanted if name not in scripted}, scripted


def _unwrapped(name: str, known: Mapping[str, nn.Module]) -> str:
    """Return a name without the wrappers of torch.compile, unless the model has a module of this name."""
    return name if name in known else ".".join(part for part in name.split(".") if part != "_orig_mod")

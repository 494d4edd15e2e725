"""Calls of a batch size, prepared for each mode: that of the given model, and others."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from moe_heads.analysis._shared.microbatches import is_out_of_memory
from moe_heads.analysis.inference_timing.calls import Call, RowKey, RowMode, TimingMode
from moe_heads.analysis.inference_timing.measure import TimedCall, first_line
from moe_heads.analysis.inference_timing.modes import ModeUnavailableError, form_of, in_mode
from moe_heads.analysis.inference_timing.overhead import null_of
from moe_heads.routing import Router

__all__ = ["GivenModes", "timed_calls"]

_COMPILED = "is compiled in the given model. Pass the model without torch.compile for this mode"
_STAGE = "runs inside a compiled program, and stages of a head run alone in eager mode only"


class GivenModes(Protocol):
    """Modes in which the modules run inside the given model."""

    def mode_of(self, row: str) -> RowMode:
        """Return the mode of a module, by row name."""

    def as_given(self, row: str, call: Call, form: Any) -> Call:
        """Return its call in this mode; calls with an equal form share their programs."""


def timed_calls(
    calls: Mapping[str, Sequence[Call]],
    modes: Sequence[TimingMode],
    device: torch.device,
    given: GivenModes,
    *,
    exclude: Callable[[float], None],
    tick: Callable[[], None],
) -> tuple[dict[RowKey, list[TimedCall]], dict[RowKey, str]]:
    """Prepare every call on every draw in every mode; routers and stages run in eager mode only.

    "eager" means as in the given model: what is compiled there stays compiled, and its row says so.

    Args:
        calls: The calls by row name, on each draw.
        modes: The modes.
        device: Device of the calls.
        given: Modes of the given model.
        exclude: Receives the seconds of compilation and graph capture.
        tick: Called after each preparation.

    Returns:
        The prepared calls by draw, and the reasons why others are unavailable.
    """
    prepared: dict[RowKey, list[TimedCall]] = {}
    failed: dict[RowKey, str] = {}
    for mode, (name, draws) in itertools.product(modes, calls.items()):
        own, is_stage = given.mode_of(name), isinstance(draws[0].function, Router) or draws[0].is_stage
        if mode != "eager" and is_stage:
            continue
        is_given = mode == "eager" or own == mode
        key = RowKey(name, own if is_given else mode)
        if key in prepared:
            continue
        start = time.perf_counter()
        try:
            if own != "eager" and (is_stage or not is_given):
                raise ModeUnavailableError(_STAGE if is_stage else _COMPILED)
            prepared[key] = _as_given(name, own, draws, device, given) if is_given else _converted(mode, draws, device)
        except Exception as error:
            # compilers, graph captures and kernels raise many kinds of errors, and each means: mode unavailable
            if is_out_of_memory(error):
                raise
            is_known = isinstance(error, ModeUnavailableError)
            failed[key] = str(error) if is_known else first_line(error)
            continue
        finally:
            exclude(time.perf_counter() - start)
        tick()
    return prepared, failed


def _as_given(
    name: str, mode: RowMode, draws: Sequence[Call], device: torch.device, given: GivenModes
) -> list[TimedCall]:
    prepared: list[TimedCall] = []
    for call in draws:
        call.restore_inputs()
        own = call if mode == "eager" else given.as_given(name, call, form_of(call))
        if mode != "eager":
            own()  # compiles
            own.restore_inputs()
        prepared.append(TimedCall(own, own.restore_inputs, null=null_of(own, device)))
    return prepared


def _converted(mode: TimingMode, draws: Sequence[Call], device: torch.device) -> list[TimedCall]:
    """Convert the calls of all draws for a mode; draws of the same shapes share a compiled program."""
    prepared: list[TimedCall] = []
    shared: dict[Any, Any] = {}
    for call in draws:
        call.restore_inputs()
        run = in_mode(mode, call, device, shared)
        run()  # bf16 and channels_last fail in their first run, if at all
        call.restore_inputs()
        restore = run.restore_inputs if isinstance(run, Call) else call.restore_inputs
        prepared.append(TimedCall(run, restore, null=null_of(run, device)))
    return prepared

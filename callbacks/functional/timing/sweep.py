"""The sweep over batch sizes: what is run at each of them, what is left out, and the times."""

import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from moe_heads.callbacks.functional.common.batches import Batch, ForwardFn
from moe_heads.callbacks.functional.common.microbatches import free_memory, is_out_of_memory
from moe_heads.callbacks.functional.common.monitor import Monitor, TimeUp
from moe_heads.callbacks.functional.timing.calls import MODEL, Call, call_of_model, capture, resized
from moe_heads.callbacks.functional.timing.clock import Clock
from moe_heads.callbacks.functional.timing.heads import routed_heads, twin_name
from moe_heads.callbacks.functional.timing.modes import ModeUnavailableError, in_mode
from moe_heads.callbacks.functional.timing.outlook import Outlook
from moe_heads.callbacks.functional.timing.plan import TimingPlan
from moe_heads.callbacks.functional.timing.power import Meter
from moe_heads.callbacks.functional.timing.rounds import Contender, take_turns, warm_up
from moe_heads.callbacks.functional.timing.row import Key, Skipped
from moe_heads.head import Head
from moe_heads.routing import Router

__all__ = ["Subject", "Sweep"]

_STEPS_PER_SIZE = 100


@dataclass(frozen=True)
class Subject:
    """What is timed.

    Attributes:
        model: The model.
        example: A batch on the model's device.
        forward_fn: Runs the whole model.
        named: Modules to time by themselves.
        is_required: Whether each of them has to run in the forward pass.
        twins: Dense heads beside the heads with a router, by the name of the head.
        device: Where the model is.
    """

    model: nn.Module
    example: Batch
    forward_fn: ForwardFn
    named: Mapping[str, nn.Module]
    is_required: bool
    twins: Mapping[str, Head]
    device: torch.device


class _Refused(Exception):
    """A forward pass that failed."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


@dataclass
class Sweep:
    """Runs the sizes one after the other, ascending.

    Args:
        subject: What is timed.
        plan: How.
        seed: Seed of the order of turns.
        monitor: Shows the progress and ends the sweep in time.

    Attributes:
        skipped: What was not timed.
        power: Energy and clocks of a GPU.
    """

    subject: Subject
    plan: TimingPlan
    seed: int
    monitor: Monitor
    skipped: list[Skipped] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.power, self._clock = Meter(self.subject.device), Clock(self.subject.device)
        self._order, self._outlook = random.Random(self.seed), Outlook(self.plan, self.subject.device)
        self._refusal: Exception | None = None
        self._has_run = False
        self._done, self._total = 0, _STEPS_PER_SIZE * len(self.plan.batch_sizes)

    def calls(self, size: int) -> dict[str, Call] | None:
        """The calls of one batch size, by module; None where the size is left out, for the reason in ``skipped``."""
        reason = self._outlook.why_no_pass(size)
        if not reason:
            is_first = self._outlook.is_first
            try:
                calls = self._captured(size)
            except _Refused as refused:
                error = refused.error
                reason = _out_of_memory(error) if is_out_of_memory(error) else f"failed with {_first_line(error)}"
                self._refusal = None if is_out_of_memory(error) else error
            else:
                self._has_run = True
                return calls if is_first else self._affordable(size, calls)
        self.leave_out(size, reason)
        return None

    def check(self) -> None:
        """Make sure that the model took a batch size, if it refused some.

        Raises:
            ValueError: If it refused all of them.
        """
        error = self._refusal
        if error is not None and not self._has_run:
            raise ValueError(
                f"example_batch: expected a batch that the model takes; it failed with {type(error).__name__}: {error}"
            ) from error

    def time(self, size: int, calls: Mapping[str, Call]) -> dict[Key, Contender] | None:
        """Time the calls of one batch size; None where memory runs out."""
        try:
            contenders = self._contenders(size, calls)
            with self.power.measured(size):
                take_turns(
                    contenders,
                    self._clock,
                    num_runs=self.plan.num_runs,
                    seconds=self.plan.seconds_per_size,
                    order=self._order,
                    on_round=lambda share: self._show(size, share),
                    is_over=self._outlook.is_over,
                )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.leave_out(size, _out_of_memory(error))
            return None
        self._done += _STEPS_PER_SIZE
        return contenders

    def leave_out(self, size: int, reason: str) -> None:
        """Note that a size was not timed."""
        free_memory()
        self.skipped.append(Skipped(size, None, None, reason))
        self._done += _STEPS_PER_SIZE
        self.monitor.step(self._done, self._total)

    def _show(self, size: int, share: float) -> None:
        # the last step is that of the whole
        done = self._done + int(share * (_STEPS_PER_SIZE - 1))
        self.monitor.step(done + (share >= 1), self._total, batch_size=size)

    def _affordable(self, size: int, calls: dict[str, Call]) -> dict[str, Call] | None:
        """The calls that there is time for, now that a pass is known: all of them, those of heads, or none."""
        reason = self._outlook.why_no_rounds()
        if not reason:
            return calls
        heads = routed_heads(self.subject.named)
        kept = {name: call for name, call in calls.items() if _belongs(name, heads)}
        if not kept:
            self._outlook.give_up()
            self.leave_out(size, reason)
            return None
        self.skipped += [Skipped(size, None, name, reason) for name in calls if name not in kept]
        return kept

    def _captured(self, size: int) -> dict[str, Call]:
        subject = self.subject
        forward = call_of_model(subject.forward_fn, subject.model, resized(subject.example, size))
        start = time.perf_counter()
        try:
            captured = capture(forward, subject.model, subject.named)
        except TimeUp:
            raise
        except Exception as error:
            # the user's model and function raise what they like
            raise _Refused(error) from error
        idle = [name for name in subject.named if name not in captured.calls]
        if idle and subject.is_required:
            raise ValueError(f"modules: expected modules that run in the forward pass; {idle} do not")
        self._outlook.learn_pass(size, time.perf_counter() - start, captured.num_bytes)
        return {MODEL: captured.forward, **self._with_heads(captured.calls)}

    def _with_heads(self, calls: Mapping[str, Call]) -> dict[str, Call]:
        """The calls of modules, and beside each head its stages and its dense twin."""
        found = dict(calls)
        for name, head in routed_heads(self.subject.named).items():
            if name not in calls:
                continue
            call = calls[name]
            x = call.args[0] if call.args else call.kwargs["x"]
            found |= {f"{name}.{stage}": Call(function) for stage, function in head.stages(x).items()}
            if name in self.subject.twins:
                found[twin_name(name)] = Call(self.subject.twins[name], call.args, call.kwargs)
        return found

    def _contenders(self, size: int, calls: Mapping[str, Call]) -> dict[Key, Contender]:
        """Everything in every mode, warmed up."""
        found: dict[Key, Contender] = {}
        start = time.perf_counter()
        for mode in self.plan.modes:
            for name, call in calls.items():
                if mode != "eager" and (isinstance(call.function, Router) or not call.is_whole):
                    continue
                try:
                    call.renew()  # it was counted
                    run = in_mode(mode, call, self.subject.device)
                    if mode != "eager":
                        run()  # bf16 and channels_last fail in their first run, if they do
                        call.renew()
                except Exception as error:
                    # compiler, capture and kernels raise errors of many kinds; each is a finding about the mode
                    if is_out_of_memory(error):
                        raise
                    reason = str(error) if isinstance(error, ModeUnavailableError) else _first_line(error)
                    self.skipped.append(Skipped(size, mode, name, reason))
                    continue
                self.monitor.tick()
                renew = run.renew if isinstance(run, Call) else call.renew
                found |= {Key(name, mode, cache): Contender(run, cache, renew) for cache in self.plan.caches}
        # compilers take what they take
        self._outlook.forgive(time.perf_counter() - start)
        self._warm_up(found)
        return found

    def _warm_up(self, contenders: Mapping[Key, Contender]) -> None:
        # no longer than the rounds will take
        seconds = self.plan.seconds_per_size / (2 * max(len(contenders), 1))
        for contender in contenders.values():
            self.monitor.tick()
            warm_up(
                contender,
                self._clock,
                num_runs=self.plan.warmup_runs,
                tolerance=self.plan.warmup_tolerance,
                seconds=seconds,
            )
            if self.subject.device.type == "cuda":
                contender.peak_memory = _peak_memory(contender, self.subject.device)
        known = {key: c.last_ms for key, c in contenders.items() if c.warmup_runs}
        if known.get(Key(MODEL), 0) > 0:
            self._outlook.learn_round(sum(known.values()) / 1e3, known[Key(MODEL)] / 1e3)


def _belongs(name: str, heads: Iterable[str]) -> bool:
    """Whether a call is that of a head, of a part of it, or of its dense twin."""
    return any(name in {head, twin_name(head)} or name.startswith(f"{head}.") for head in heads)


def _peak_memory(contender: Contender, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    contender.run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _out_of_memory(error: BaseException) -> str:
    return f"out of memory: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

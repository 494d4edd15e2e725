"""Speed of a head with more hidden units than it has: the size from which on it is faster than a dense head."""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from moe_heads.analysis.inference_timing.calls import Call
from moe_heads.analysis.inference_timing.clock import Clock
from moe_heads.analysis.inference_timing.measure import TimedCall, take_turns, warm_up_all
from moe_heads.analysis.inference_timing.overhead import null_of
from moe_heads.analysis.inference_timing.plan import TimingPlan
from moe_heads.analysis.inference_timing.speedup import WiderHead, dense_twin, realized_ratio
from moe_heads.experts import Experts
from moe_heads.routed_module import RoutedModule

__all__ = ["wider_heads"]

_FACTORS = (2, 4, 8, 16, 32, 64)
# of the weights of one widened head
_MOST_BYTES = 2**28
_MOST_RUNS = 60


def wider_heads(
    head: RoutedModule,
    call: Call,
    clock: Clock,
    plan: TimingPlan,
    *,
    batch_size: int,
    seed: int,
    tick: Callable[[], None],
) -> Iterator[WiderHead]:
    """Time a head with 2, 4, … 64 times its hidden units, on the same inputs with the same router.

    Args:
        head: The head.
        call: Its call at a batch size.
        clock: The clock.
        plan: Options; each width takes a quarter of ``seconds_per_size``.
        batch_size: Samples of the batch.
        seed: Seed of the weights, of the order of turns and of the bootstrap.
        tick: Called before each width.

    Yields:
        The speed at each width, up to weights of 256 MiB.
    """
    for factor in _FACTORS:
        tick()
        wide = _widened(head, factor, seed)
        if wide is None:
            return
        calls = {
            name: _timed(replace(call, function=module), clock)
            for name, module in (("head", wide), ("dense", dense_twin(wide)))
        }
        short = replace(plan, num_runs=min(plan.num_runs, _MOST_RUNS), seconds_per_size=plan.seconds_per_size / 4)
        seconds = warm_up_all(calls, clock, short, tick)
        take_turns(
            calls,
            clock,
            num_runs=short.num_runs,
            seconds=seconds,
            order=random.Random(seed),
            on_round=lambda share: tick(),
        )
        ratio = realized_ratio([calls["dense"].wall_ms()], [calls["head"].wall_ms()], seed)
        yield WiderHead(int(wide.get_submodule("experts").width), batch_size, *ratio)  # type: ignore[arg-type]


def _timed(call: Call, clock: Clock) -> TimedCall:
    return TimedCall(call, call.restore_inputs, null=null_of(call, clock.device))


def _widened(head: RoutedModule, factor: int, seed: int) -> RoutedModule | None:
    """Return a copy of a head with other experts; None for a head without experts, or with too large ones."""
    experts = getattr(head, "experts", None)
    if not isinstance(experts, Experts) or factor * sum(p.nbytes for p in experts.parameters()) > _MOST_BYTES:
        return None
    kept = dict(head._modules)
    wide = copy.copy(head)
    wide._modules = kept
    first = next(experts.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in ("experts", "shared"):
            own = kept.get(name)
            if isinstance(own, Experts):
                wider = Experts(
                    own.num_experts, own.in_features, factor * own.width, own.out_features, own.dropout, own.activation
                )
                kept[name] = wider.to(first.device, first.dtype).requires_grad_(False).eval()
    vars(wide)["expert_width"] = factor * experts.width
    return wide

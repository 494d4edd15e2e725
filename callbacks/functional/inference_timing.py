"""Inference timing: latency percentiles and throughput of a model, and of its parts by themselves."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.callbacks.functional.common.batches import (
    Batch,
    ForwardFn,
    batch_size,
    call_model,
    map_leaves,
    to_device,
)
from moe_heads.callbacks.functional.common.environment import device_of, environment_of, synchronize
from moe_heads.callbacks.functional.common.monitor import Monitor, TimeUp
from moe_heads.callbacks.functional.common.preserve import preserved
from moe_heads.callbacks.functional.timing.result import InferenceTimingResult
from moe_heads.callbacks.functional.timing.row import TimingRow
from moe_heads.routing import Router

__all__ = ["check_timing_options", "inference_timing"]

_MODEL = "model"


def inference_timing(
    model: nn.Module,
    example_batch: Batch,
    *,
    batch_sizes: Sequence[int] = (1, 32, 256),
    modules: Sequence[str] | None = None,
    num_runs: int = 50,
    warmup_runs: int = 10,
    forward_fn: ForwardFn = call_model,
    seed: int = 0,
    monitor: Monitor | None = None,
) -> InferenceTimingResult:
    """Wall time of the forward pass, of the whole model and of modules inside it timed alone.

    A backbone is nearly all of the arithmetic and hides what a head costs; so each module is also run by itself, on the
    inputs that it had in one forward pass at that batch size. Everything runs in evaluation and inference mode with the
    inputs on the model's device; the clock is read after the device has finished. After the warm-up all modules take
    turns in a random order in every round, so that a drift of the clock rate meets all alike. No run is left out.

    Threads, precision and autocast are those of the caller (recorded in the result), as are the attention kernels:
    they are what is measured. Unlike the other analyses this one therefore does not use `analysis_mode`. The model is
    left bit for bit as it was, also after an error.

    Args:
        model: The model.
        example_batch: A batch of any size; its samples are repeated or cut to each batch size.
        batch_sizes: Batch sizes: a single request, a server's batch, and one that fills the machine.
        modules: Dotted names of the modules to time alone; by default "backbone" and "head" where the model has them,
            and every module that owns a router of this package, those that run in the forward pass.
        num_runs: Timed runs of each. 50 leave five above p90; a p99 that means something takes 200 or more.
        warmup_runs: Runs of each before, at each batch size.
        forward_fn: ``forward_fn(model, batch)`` runs the whole model.
        seed: Seed of the order of turns and of the random number generators.
        monitor: Shows the rounds, warm-up included, and ends the analysis when its time is over; see `Monitor`.

    Returns:
        A row for each batch size and module, the whole model first. Of the batch sizes that were finished, marked by
        ``partial``, when the time of the monitor is over.

    Raises:
        ValueError: If the batch is empty, a number is below its minimum, a batch size comes twice, or a module is
            unknown or does not run in the forward pass.

    Example:
        >>> import torch
        >>> from moe_heads.callbacks.functional.inference_timing import inference_timing
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> timing = inference_timing(model, torch.randn(4, 8), batch_sizes=[1, 2], modules=["1"], num_runs=3)
        >>> [(row.module, row.batch_size) for row in timing.rows]
        [('model', 1), ('1', 1), ('model', 2), ('1', 2)]
    """
    check_timing_options(batch_sizes, num_runs, warmup_runs)
    if batch_size(example_batch) == 0:
        raise ValueError("example_batch: expected at least one sample; got none")
    named = _named_modules(model, modules)
    device = device_of(model)
    example = to_device(example_batch, device)
    order = random.Random(seed)
    monitor, rounds_each = monitor or Monitor(), warmup_runs + num_runs
    rows: list[TimingRow] = []

    def result(reason: str = "") -> InferenceTimingResult:
        return InferenceTimingResult(tuple(rows), environment_of(model), warmup_runs, seed, reason)

    with preserved(model):
        model.eval()
        torch.manual_seed(seed)
        try:
            with torch.inference_mode():
                for done, size in enumerate(batch_sizes):
                    batch = _resized(example, size)
                    calls: dict[str, Callable[[], object]] = {_MODEL: partial(forward_fn, model, batch)}
                    calls |= _captured(calls[_MODEL], named, required=modules is not None)
                    times: dict[str, list[float]] = {name: [] for name in calls}
                    for index in range(rounds_each):
                        for name in order.sample(list(calls), len(calls)):
                            elapsed = _elapsed_ms(calls[name], device)
                            if index >= warmup_runs:
                                times[name].append(elapsed)
                        monitor.step(done * rounds_each + index + 1, len(batch_sizes) * rounds_each)
                    rows += [_row(size, name, values) for name, values in times.items()]
                    monitor.keep(result)
        except TimeUp as error:
            in_time: InferenceTimingResult = monitor.result_in_time(error)
            return in_time
        return result()


def check_timing_options(batch_sizes: Sequence[int], num_runs: int, warmup_runs: int) -> None:
    """Refuse what no model could be timed with."""
    sizes = batch_sizes if isinstance(batch_sizes, (list, tuple)) else ()
    if not sizes or not all(isinstance(size, int) and size >= 1 for size in sizes) or len(set(sizes)) < len(sizes):
        raise ValueError(f"batch_sizes: expected a list of different whole numbers from 1 on; got {batch_sizes!r}")
    if not isinstance(num_runs, int) or num_runs < 1:
        raise ValueError(f"num_runs: expected at least 1; got {num_runs}")
    if warmup_runs < 0:
        raise ValueError(f"warmup_runs: expected at least 0; got {warmup_runs}")


def _named_modules(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Module]:
    inside = {name: module for name, module in model.named_modules() if name}
    if names is None:
        owners = {name.rpartition(".")[0] for name, module in inside.items() if isinstance(module, Router)}
        names = [name for name in inside if name in {"backbone", "head"} | owners]
    unknown = [name for name in names if name not in inside]
    if unknown:
        raise ValueError(f"modules: expected names of modules, such as {next(iter(inside), None)!r}; got {unknown}")
    # a child that is itself called "model" must not take the place of the whole
    return {f"{_MODEL}.{name}" if name == _MODEL else name: inside[name] for name in names}


def _resized(batch: Batch, size: int) -> Batch:
    """The batch with its samples repeated or cut to ``size``; tensors that do not count the samples stay."""
    given = batch_size(batch)

    def resize(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != given:
            return leaf
        return leaf[torch.arange(size, device=leaf.device) % given]

    return map_leaves(batch, resize)


def _captured(
    forward: Callable[[], object], named: dict[str, nn.Module], *, required: bool
) -> dict[str, Callable[[], object]]:
    """A call of each module on the inputs of its first call in the forward pass."""
    inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # a copy: a later layer may work in place
        inputs.setdefault(name, map_leaves((args, kwargs), lambda x: x.clone() if isinstance(x, Tensor) else x))

    with ExitStack() as stack:
        for name, module in named.items():
            handle = module.register_forward_pre_hook(partial(record, name), with_kwargs=True)
            stack.callback(handle.remove)
        forward()
    idle = [name for name in named if name not in inputs]
    if idle and required:
        raise ValueError(f"modules: expected modules that run in the forward pass; {idle} do not")
    return {name: partial(named[name], *args, **kwargs) for name, (args, kwargs) in inputs.items()}


def _elapsed_ms(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter_ns()
    call()
    synchronize(device)
    return (time.perf_counter_ns() - start) / 1e6


def _row(size: int, name: str, times: list[float]) -> TimingRow:
    p50, p90, p99 = torch.quantile(
        torch.tensor(times, dtype=torch.float64), torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)
    ).tolist()
    mean = statistics.fmean(times)
    return TimingRow(
        batch_size=size,
        mode="eager",
        module=name,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        mean_ms=mean,
        std_ms=statistics.stdev(times) if len(times) > 1 else float("nan"),
        num_runs=len(times),
        samples_per_s=1000 * size / mean,
    )

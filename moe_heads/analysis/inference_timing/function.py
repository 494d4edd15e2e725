"""Latency percentiles and throughput of a model and of its parts, and the speedup of a sparse head."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moe_heads.analysis._shared.arguments import check_arguments
from moe_heads.analysis._shared.batches import Batch, ForwardFn, call_model
from moe_heads.analysis._shared.environment import device_of, environment_of
from moe_heads.analysis._shared.names import check_names
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis._shared.state import preserved
from moe_heads.analysis.inference_timing.calls import TimingMode
from moe_heads.analysis.inference_timing.capture import TimedModel, named_modules
from moe_heads.analysis.inference_timing.compilation import compilation_of
from moe_heads.analysis.inference_timing.entries import call_request
from moe_heads.analysis.inference_timing.own_code import records_kept
from moe_heads.analysis.inference_timing.plan import DEFAULT_SIZES, TimingPlan
from moe_heads.analysis.inference_timing.requests import BatchFn, requests_of
from moe_heads.analysis.inference_timing.result import InferenceTimingResult
from moe_heads.analysis.inference_timing.rows import Skipped
from moe_heads.analysis.inference_timing.served import ServedPrograms, check_served
from moe_heads.analysis.inference_timing.speedup import dense_twin
from moe_heads.analysis.inference_timing.sweep import Sweep
from moe_heads.routed_module import RoutedModule

__all__ = ["inference_timing"]

_SCRIPTED = "compiled by TorchScript, which hides the inputs of its modules"


def inference_timing(
    model: nn.Module,
    example_batch: Batch | BatchFn,
    *,
    batch_sizes: Sequence[int] = DEFAULT_SIZES,
    modules: Sequence[str] | None = None,
    modes: Sequence[TimingMode] = ("eager",),
    num_runs: int = 1000,
    warmup_runs: int | None = None,
    warmup_tolerance: float = 0.05,
    seconds_per_size: float = 0.8,
    max_seconds: float = 50.0,
    num_draws: int | None = None,
    served: Mapping[str, Any] | None = None,
    forward_fn: ForwardFn = call_model,
    seed: int = 0,
    progress: Progress | None = None,
) -> InferenceTimingResult:
    """Measure the wall time of the forward pass over batch sizes: of the whole model, of its parts, and of dense twins.

    A backbone performs nearly all of the arithmetic and hides the cost of a head. Each module is therefore also timed
    alone, on the inputs that it has in one forward pass at that batch size, and a sparse head is divided further. A
    dense head of equal capacity runs for each head with a router, so that the ratio of their times can be compared with
    the ratio of their operations.

    Everything runs in evaluation and inference mode, in one process, with the inputs on the model's device. The clock
    is read after the device has finished. After the warm-up, all calls of a batch size run in rounds, each in a new
    random order, so that a drift of the clock rate affects all of them alike. No run is left out, and Python's garbage
    is collected between the rounds. The interval of each median accounts for dependent runs. It
    cannot account for changes outside the measured period, such as a machine that is slower for an hour.

    Threads, precision, autocast and attention kernels are those of the caller, because they are part of what is
    measured. The result records them, and this analysis alone does not use `analysis_mode`. The model is restored bit
    for bit, also after an error.

    Args:
        model: The model.
        example_batch: A function ``size -> batch`` that returns other samples at each call, or a batch of any size,
            whose samples are repeated or cut to each batch size. Prefer the function if samples differ in length: the
            rows of one batch are padded to its longest sample, also at batch size 1. Labels stay out of the default
            forward pass, see ``forward_fn``.
        batch_sizes: Batch sizes, run in ascending order, from a single request to one that saturates the machine. A
            size at which the model fails is listed in ``skipped``.
        modules: Dotted names of the modules to time alone. By default these are "backbone" and "head", every module
            that owns a router of this package, and the routers, as far as they run in the forward pass. A model that is
            such a head itself is then divided as well.
        modes: Execution modes, of "eager", "compiled" (torch.compile), "cuda_graph", "bf16" (autocast) and
            "channels_last" (memory format). Routers and stages run in "eager" only. The default is eager only, because
            compilation takes longer than all the rest. A mode that fails is listed in ``skipped``.
        num_runs: Largest number of runs of each call on each draw: 1,000 leave ten above p99. The time limit usually
            ends them earlier. A longer measurement covers more slow phases of the machine.
        warmup_runs: Warm-up runs of each call at each batch size. By default the warm-up lasts until the median of five
            runs is within ``warmup_tolerance`` of that of the five before, and takes at most half of
            ``seconds_per_size`` in all.
        warmup_tolerance: Relative tolerance of the warm-up; a quiet machine reaches 5 % within its first ten runs.
        seconds_per_size: Seconds per batch size, including the warm-up. No further round begins after that, unless
            there were fewer than six. Six sizes of a small model take 5 s, and some 3 s more with wider heads.
        max_seconds: Seconds of the whole sweep, without compilation and graph capture. If six rounds of a size do not
            fit, only the heads are timed, and if no pass fits, nothing; ``skipped`` gives the reason. No round begins
            that would end too late, so that a size may have fewer than six. The smallest size is always timed.
        num_draws: Number of batches that are timed at each size, to tell their spread from the noise. By default five
            if the model has a router that chooses experts or if the drawn shapes differ, and one otherwise. Rows of
            one example have one shape, and give only as many draws as fit into it. Large sizes have fewer, so that
            their draws hold no more than 1,024 samples, but at least two. The draws share the time of their size.
        served: Programs to time next to the model on the same batches, by the name of their rows: a
            `torch.export.ExportedProgram`, an ONNX Runtime session (with its own threads), a package of AOTInductor or
            another callable. The result has the difference of their outputs from those of the model. A program that
            does not accept a batch size is listed in ``skipped``.
        forward_fn: ``forward_fn(model, batch)`` runs the whole model on the whole batch. By default the first entry of
            a tuple is passed, and the entries of a mapping by name, without those for the loss: labels, and optional
            entries without which the output has no loss.
        seed: Seed of the order of turns, of the bootstrap and of the random number generators.
        progress: Progress display and time limit; see `Progress`.

    Returns:
        One row per batch size, mode and module, the whole model first; the division of the time; the gap of each head.
        If the time limit of ``progress`` is reached, the result holds the finished batch sizes and sets ``partial``.

    Raises:
        ValueError: If the batch is empty, counts its samples elsewhere than in the first dimension of its tensors (such
            as a ``PackedSequence``), has another size than requested, or fails at every size; if the model gives no
            output without its labels; if a number is out of range or a batch size is repeated; or if a module is
            unknown, compiled by TorchScript, or does not run in the forward pass.

    Example:
        >>> import torch
        >>> from moe_heads.analysis import inference_timing
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> timing = inference_timing(model, torch.randn(4, 8), batch_sizes=[1, 2], modules=["1"], num_runs=3)
        >>> [(row.module, row.batch_size) for row in timing.rows]
        [('model', 1), ('1', 1), ('model', 2), ('1', 2)]
    """
    plan = TimingPlan(
        batch_sizes, modes, num_runs, warmup_runs, warmup_tolerance, seconds_per_size, max_seconds, num_draws
    )
    check_arguments(model=model, forward_fn=forward_fn, seed=seed, progress=progress)
    check_names(modules=modules)
    check_served(served)
    device, progress, given_forward_fn = device_of(model), progress or Progress(), forward_fn
    with preserved(model), records_kept():
        model.eval()
        torch.manual_seed(seed)
        environment, compilation = environment_of(model), compilation_of(model, forward_fn)
        if compilation is not None:
            # what is compiled in the given model is compiled again for its rows, in code of their own
            model, forward_fn = compilation.model, compilation.forward_fn
        named, scripted = named_modules(model, modules)
        check_served(served, tuple(named))
        requests = requests_of(
            model, example_batch, batch_sizes, forward_fn, num_draws=num_draws, seed=seed, device=device
        )
        # the default looks at the signature of the model, which is no part of a request
        forward_fn = call_request if forward_fn is call_model else forward_fn
        timed = TimedModel(model, requests, forward_fn, named, modules is not None, device)
        twins: dict[str, RoutedModule] = {}
        skipped = [Skipped(None, None, name, _SCRIPTED) for name in scripted]
        for name, head in timed.heads.items():
            try:
                twins[name] = dense_twin(head)
            except ValueError as error:
                skipped.append(Skipped(None, None, timed.twin_name(name), str(error)))
        timed = replace(timed, twins=twins, compilation=compilation)
        with torch.inference_mode():
            sweep = Sweep(
                timed, plan, seed, progress, environment, skipped, ServedPrograms(served or {}, given_forward_fn)
            )
            try:
                for size in sorted(batch_sizes):
                    sweep.add(size)
                    progress.keep(sweep.result)
                sweep.check()
                sweep.widen()
            except TimeUp as error:
                partial: InferenceTimingResult = progress.result_in_time(error)
                return partial
        return sweep.result()

"""Inference timing: latency percentiles and throughput of a model and of its parts, and what a sparse head gains."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from moe_heads.analysis._shared.batches import Batch, ForwardFn, call_model, to_device
from moe_heads.analysis._shared.environment import device_of, environment_of
from moe_heads.analysis._shared.preserve import preserved
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis.inference_timing.calls import named_modules, unseen_modules
from moe_heads.analysis.inference_timing.findings import Findings
from moe_heads.analysis.inference_timing.gap import dense_twin
from moe_heads.analysis.inference_timing.heads import twin_name
from moe_heads.analysis.inference_timing.plan import DEFAULT_SIZES, TimingPlan
from moe_heads.analysis.inference_timing.resize import check_resizable, num_rows
from moe_heads.analysis.inference_timing.result import InferenceTimingResult
from moe_heads.analysis.inference_timing.rounds import Cache
from moe_heads.analysis.inference_timing.row import Skipped, TimingMode
from moe_heads.analysis.inference_timing.subject import Subject
from moe_heads.analysis.inference_timing.sweep import Sweep
from moe_heads.checks import check_seed
from moe_heads.head import Head

__all__ = ["inference_timing"]


def inference_timing(
    model: nn.Module,
    example_batch: Batch,
    *,
    batch_sizes: Sequence[int] = DEFAULT_SIZES,
    modules: Sequence[str] | None = None,
    modes: Sequence[TimingMode] = ("eager",),
    caches: Sequence[Cache] = ("warm",),
    num_runs: int = 1000,
    warmup_runs: int | None = None,
    warmup_tolerance: float = 0.05,
    seconds_per_size: float = 0.8,
    max_seconds: float = 50.0,
    forward_fn: ForwardFn = call_model,
    seed: int = 0,
    progress: Progress | None = None,
) -> InferenceTimingResult:
    """Wall time of the forward pass over batch sizes: of the whole, of its parts alone, and of a head's dense twin.

    A backbone is nearly all of the arithmetic and hides what a head costs; so each module is also run by itself, on the
    inputs that it had in one forward pass at that batch size, and a sparse head is split further. Beside each head with
    a router runs the dense head of equal capacity: the ratio of their times stands against that of their arithmetic.

    Everything runs in evaluation and inference mode, in one process, with the inputs on the model's device; the clock
    is read after the device has finished. After the warm-up all of a batch size take turns in a new random order in
    every round, so that a drift of the clock rate meets all alike. No run is left out; Python's garbage is collected
    between the rounds. The interval of each median allows for runs that are not independent
    (`median_interval`); what no run saw, such as a machine that is slower for an hour, it cannot know.

    Threads, precision and autocast are those of the caller (recorded in the result), as are the attention kernels:
    they are what is measured. Unlike the other analyses this one therefore does not use `analysis_mode`. The model is
    left bit for bit as it was, also after an error.

    Args:
        model: The model.
        example_batch: A batch of any size; its samples are repeated or cut to each batch size.
        batch_sizes: Batch sizes, run in ascending order: from a single request to one that fills the machine. One at
            which the model fails is named in ``skipped``.
        modules: Dotted names of the modules to time alone; by default "backbone" and "head" where the model has them,
            every module that owns a router of this package, and the router, those that run in the forward pass; a model
            that is such a head itself is then split as well.
        modes: How to run them, see `TimingMode`; routers and stages in "eager" alone. By default eager only: compiling
            takes longer than all the rest. What does not work is named in ``skipped``.
        caches: "warm": a module finds the caches as its last run left them; "cold": as something else did.
        num_runs: Most runs of each: 1,000 leave ten above p99. The time mostly ends them sooner; the longer they go on,
            the more of the machine's slow phases the interval knows of.
        warmup_runs: Runs of each before, at each batch size. By default until the median of five is within
            ``warmup_tolerance`` of that of the five before, for at most half of ``seconds_per_size`` in all.
        warmup_tolerance: See there; 5 % is what a quiet machine reaches with its first ten runs.
        seconds_per_size: Time of a batch size, the warm-up in it, after which no further round begins, unless there
            were fewer than six. Six sizes of a small model take 5 s.
        max_seconds: Time of the whole sweep, compilation and capture aside: of a size whose six rounds would go beyond
            it only the heads are timed, or nothing where not even a pass fits; ``skipped`` says so. No round begins
            that would end after it, so that a size may have fewer than six. The smallest size is always timed.
        forward_fn: ``forward_fn(model, batch)`` runs the whole model.
        seed: Seed of the order of turns, of the bootstrap and of the random number generators.
        progress: Shows the rounds and ends the analysis when its time is over; see `Progress`.

    Returns:
        A row for each batch size, mode and module, the whole model first; the split of the time; the gap of each head.
        Of the batch sizes that were finished, marked by ``partial``, when the time of the progress is over.

    Raises:
        ValueError: If the batch is empty, cannot be repeated (`check_resizable`), or the model takes it at no size, a
            number is out of range, a batch size comes twice, or a module is unknown, compiled by TorchScript, or does
            not run in the forward pass.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.inference_timing.function import inference_timing
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> timing = inference_timing(model, torch.randn(4, 8), batch_sizes=[1, 2], modules=["1"], num_runs=3)
        >>> [(row.module, row.batch_size) for row in timing.rows]
        [('model', 1), ('1', 1), ('model', 2), ('1', 2)]
    """
    plan = TimingPlan(
        batch_sizes, modes, caches, num_runs, warmup_runs, warmup_tolerance, seconds_per_size, max_seconds
    )
    check_seed(seed)
    if num_rows(example_batch) == 0:
        raise ValueError("example_batch: expected at least one sample, got none")
    if any(size != num_rows(example_batch) for size in batch_sizes):
        check_resizable(example_batch)
    named = named_modules(model, modules)
    device, progress = device_of(model), progress or Progress()
    with preserved(model):
        model.eval()
        torch.manual_seed(seed)
        subject = Subject(model, to_device(example_batch, device), forward_fn, named, modules is not None, device)
        twins, failed = _dense_twins(subject.heads)
        subject = replace(subject, twins=twins)
        with torch.inference_mode():
            sweep = Sweep(subject, plan, seed, progress)
            sweep.skipped += failed
            if modules is None:
                reason = "compiled by TorchScript, which does not show the inputs of its modules"
                sweep.skipped += [Skipped(None, None, name, reason) for name in unseen_modules(model)]
            findings = Findings(sweep, environment_of(model))
            try:
                for size in sorted(batch_sizes):
                    findings.add(size)
                    progress.keep(findings.result)
                sweep.check()
            except TimeUp as error:
                in_time: InferenceTimingResult = progress.result_in_time(error)
                return in_time
        return findings.result()


def _dense_twins(heads: dict[str, Head]) -> tuple[dict[str, Head], list[Skipped]]:
    """The dense head of equal capacity of each head; of a head that has none near enough, why."""
    twins: dict[str, Head] = {}
    failed = []
    for name, head in heads.items():
        try:
            twins[name] = dense_twin(head)
        except ValueError as error:
            failed.append(Skipped(None, None, twin_name(name), str(error)))
    return twins, failed

"""Peak CPU memory of torch during a function call."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_memory"]


def peak_memory(function: Callable[[], object]) -> int:
    """Return the peak number of bytes above the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    held, peak = 0, 0
    results = profiler.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        peak = max(peak, held)
    return peak

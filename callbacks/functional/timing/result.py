"""What an inference timing found, and how it is reported."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moe_heads.callbacks.functional.environment import Environment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["InferenceTimingResult", "TimingMode", "TimingRow"]

TimingMode = Literal["eager"]
"""How the model runs: "eager", as Python calls it."""


@dataclass(frozen=True)
class TimingRow:
    """Wall times of one module at one batch size, synchronised with the device before each reading of the clock.

    Attributes:
        batch_size: Samples of a batch.
        mode: How the model ran.
        module: "model" for the whole forward pass, else the module's dotted name.
        p50_ms: Median, milliseconds. Percentiles are interpolated linearly between the runs; none is left out.
        p90_ms: 90th percentile.
        p99_ms: 99th percentile; with fewer than 100 runs it lies between the two slowest.
        mean_ms: Mean.
        std_ms: Standard deviation of the runs (nan for a single run).
        num_runs: Runs timed.
        samples_per_s: Samples a second over all runs, ``batch_size / mean``.
    """

    batch_size: int
    mode: TimingMode
    module: str
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    std_ms: float
    num_runs: int
    samples_per_s: float


@dataclass(frozen=True)
class InferenceTimingResult:
    """Latency and throughput of a model and of parts of it.

    Attributes:
        rows: One for each batch size and module.
        environment: Processor, data type, threads, versions.
        warmup_runs: Runs of each module that were not timed.
        seed: Seed of the order in which the modules took turns.
    """

    rows: tuple[TimingRow, ...]
    environment: Environment
    warmup_runs: int
    seed: int

    def metrics(self) -> dict[str, float]:
        """The numbers to log, ``<module>/batch<size>/<quantity>``."""
        return {
            f"{row.module}/batch{row.batch_size}/{quantity}": getattr(row, quantity)
            for row in self.rows
            for quantity in ("p50_ms", "p90_ms", "p99_ms", "samples_per_s")
        }

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Median latency over batch size, whiskers up to the 90th and the 99th percentile, a line a module.

        Args:
            ax: Axes to draw into; by default those of a new figure that pyplot does not know.
        """
        from moe_heads.callbacks.functional.timing.figure import plot_timing

        return plot_timing(self, ax)

    def summary(self) -> str:
        """Markdown table of the rows and a line on the environment."""
        header = "| module | batch | mode | p50 ms | p90 ms | p99 ms | samples/s |"
        rows = [
            f"| {row.module} | {row.batch_size} | {row.mode} | {row.p50_ms:.4g} | {row.p90_ms:.4g} | {row.p99_ms:.4g} "
            f"| {row.samples_per_s:,.0f} |"
            for row in self.rows
        ]
        how = f"\n{self.rows[0].num_runs} runs each after {self.warmup_runs} to warm up; {self.environment}."
        return "\n".join([header, "|---" * 7 + "|", *rows, how])

"""What an inference timing found, and how it is reported."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_heads.callbacks.functional.common.environment import Environment
from moe_heads.callbacks.functional.timing.row import TimingRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["InferenceTimingResult"]


@dataclass(frozen=True)
class InferenceTimingResult:
    """Latency and throughput of a model and of parts of it.

    Attributes:
        rows: One for each batch size and module.
        environment: Processor, data type, threads, versions.
        warmup_runs: Runs of each module that were not timed.
        seed: Seed of the order in which the modules took turns.
        partial: Why the analysis ended before its time; "" for one that is whole.
    """

    rows: tuple[TimingRow, ...]
    environment: Environment
    warmup_runs: int
    seed: int
    partial: str = ""

    def metrics(self) -> dict[str, float]:
        """The numbers to log, ``<module>/batch<size>/<quantity>``."""
        values = {
            f"{row.module}/batch{row.batch_size}/{quantity}": getattr(row, quantity)
            for row in self.rows
            for quantity in ("p50_ms", "p90_ms", "p99_ms", "samples_per_s")
        }
        return values | ({"partial": 1.0} if self.partial else {})

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Median latency over batch size, whiskers up to the 90th and the 99th percentile, a line a module.

        Args:
            ax: Axes to draw into; by default those of a new figure that pyplot does not know.
        """
        from moe_heads.callbacks.functional.timing.figure import plot_timing

        return plot_timing(self.rows, self.environment.device, ax)

    def summary(self) -> str:
        """Markdown table of the rows and a line on the environment."""
        header = "| module | batch | mode | p50 ms | p90 ms | p99 ms | samples/s |"
        rows = [
            f"| {row.module} | {row.batch_size} | {row.mode} | {row.p50_ms:.4g} | {row.p90_ms:.4g} | {row.p99_ms:.4g} "
            f"| {row.samples_per_s:,.0f} |"
            for row in self.rows
        ]
        how = f"\n{self.rows[0].num_runs} runs each after {self.warmup_runs} to warm up; {self.environment}."
        partial = [f"\n**Partial**: {self.partial}."] if self.partial else []
        return "\n".join([header, "|---" * 7 + "|", *rows, how, *partial])

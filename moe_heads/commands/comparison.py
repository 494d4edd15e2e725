"""Numbers of several runs side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from moe_heads.commands.numbers import differ
from moe_heads.commands.runs import Run

__all__ = ["Row", "Section", "sections_of"]


@dataclass(frozen=True)
class Row:
    """One quantity of all runs.

    Attributes:
        name: Name of the metric.
        values: Value of each run, None where it is missing.
        errors: Error of each run, None where it is unknown.
        different: Pairs of runs, by their place, that differ by more than their errors.
        compared: Whether at least one pair has errors to compare.
    """

    name: str
    values: tuple[float | None, ...]
    errors: tuple[float | None, ...]
    different: tuple[tuple[int, int], ...]
    compared: bool


@dataclass(frozen=True)
class Section:
    """Numbers of one analysis of one split.

    Attributes:
        analysis: Name of the analysis.
        split: The split.
        rows: One row for each metric that a run has.
        partial: Reason of an early end by label of the run.
    """

    analysis: str
    split: str
    rows: tuple[Row, ...]
    partial: dict[str, str]


def sections_of(runs: Sequence[Run]) -> list[Section]:
    """Return the numbers of all analyses and splits that a run has."""
    keys = dict.fromkeys(
        (analysis, split) for run in runs for analysis, splits in run.content["analyses"].items() for split in splits
    )
    return [_section(runs, analysis, split) for analysis, split in keys]


def _section(runs: Sequence[Run], analysis: str, split: str) -> Section:
    found = [run.split(analysis, split) or {"metrics": {}, "errors": {}, "partial": ""} for run in runs]
    names = dict.fromkeys(name for entry in found for name in entry["metrics"])
    rows = []
    for name in names:
        values = tuple(entry["metrics"].get(name) for entry in found)
        errors = tuple(entry["errors"].get(name) for entry in found)
        verdicts = {
            (one, other): differ(first, second, errors[one], errors[other])
            for (one, first), (other, second) in combinations(enumerate(values), 2)
            if first is not None and second is not None
        }
        different = tuple(pair for pair, verdict in verdicts.items() if verdict)
        rows.append(Row(name, values, errors, different, any(verdict is not None for verdict in verdicts.values())))
    partial = {run.label: entry["partial"] for run, entry in zip(runs, found, strict=True) if entry["partial"]}
    return Section(analysis, split, tuple(rows), partial)

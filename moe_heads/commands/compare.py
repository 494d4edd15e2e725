"""Command ``compare``: one page with the numbers of several analyzed checkpoints."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_heads.checks import check_at_least
from moe_heads.commands.barriers import Barrier, BarrierOptions, barriers_of
from moe_heads.commands.comparison import Section, sections_of
from moe_heads.commands.comparison_figures import plot_barriers, plot_spectra, rendered
from moe_heads.commands.comparison_page import Page, html_page, markdown_page
from moe_heads.commands.errors import check_device
from moe_heads.commands.folders import check_free, new_folder
from moe_heads.commands.numbers import RULE
from moe_heads.commands.runs import Run, read_runs

__all__ = ["CompareOptions", "compare_results"]

_JSON = "compare.json"


@dataclass(frozen=True)
class CompareOptions:
    """Options of the command.

    Attributes:
        out: Folder of the page.
        dirs: Folders of ``moe-heads analyze``.
        no_barriers: Whether to skip the loss barriers, for which the models are loaded again.
        num_samples: Number of samples of each split for the barriers.
        num_points: Number of positions on a line.
        seed: Seed of the samples and of the matching.
        device: Device, or None for the CPU.
        unpickle: Whether to load objects other than tensors and plain data from checkpoints.
        overwrite: Whether to replace an earlier page.
    """

    out: str
    dirs: list[str] = field(default_factory=list)
    no_barriers: bool = False
    num_samples: int = 1000
    num_points: int = 11
    seed: int = 0
    device: str | None = None
    unpickle: bool = False
    overwrite: bool = False


def compare_results(options: CompareOptions) -> Path:
    """Write the page and return its path.

    Raises:
        CommandError: If a folder has no results, or an option is invalid.
    """
    out = Path(options.out)
    check_free(out, overwrite=options.overwrite)
    check_device(options.device)
    check_at_least(3, num_points=options.num_points)
    check_at_least(1, num_samples=options.num_samples)
    runs = read_runs(options.dirs)
    settings = BarrierOptions(options.num_samples, options.num_points, options.seed, options.device, options.unpickle)
    with new_folder(out, marker=_JSON, overwrite=options.overwrite) as folder:
        sections = sections_of(runs)
        barriers = [] if options.no_barriers else barriers_of(runs, settings)
        splits = dict.fromkeys(section.split for section in sections if section.analysis == "sharpness")
        figures = {f"spectra_{split}": plot_spectra(runs, split) for split in splits}
        figures["barriers"] = plot_barriers(barriers)
        drawn = {name: figure for name, figure in figures.items() if figure is not None}
        images = {name: rendered(figure, "svg") for name, figure in drawn.items()}
        page = Page(runs, sections, barriers, images)
        for name, figure in drawn.items():
            (folder / f"{name}.png").write_bytes(rendered(figure, "png"))
        (folder / "compare.html").write_text(html_page(page), encoding="utf-8")
        (folder / "compare.md").write_text(markdown_page(page), encoding="utf-8")
        content = json.dumps(_content(runs, sections, barriers), indent=1)
        (folder / _JSON).write_text(content + "\n", encoding="utf-8")
    return out / "compare.html"


def _content(runs: list[Run], sections: list[Section], barriers: list[Barrier]) -> dict[str, Any]:
    return {
        "rule": RULE,
        "runs": [{"label": run.label, "folder": str(run.folder), **_without_numbers(run)} for run in runs],
        "numbers": [asdict(section) for section in sections],
        "barriers": [_barrier(barrier) for barrier in barriers],
    }


def _without_numbers(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.content.items() if key != "analyses"}


def _barrier(barrier: Barrier) -> dict[str, Any]:
    found: dict[str, Any] = {"first": barrier.first, "second": barrier.second, "split": barrier.split}
    if barrier.before is None or barrier.after is None or barrier.match is None:
        return {**found, "reason": barrier.reason}
    for name, line in (("before", barrier.before), ("after", barrier.after)):
        found[name] = {
            "barrier": _finite(line.barrier),
            "stderr": _finite(line.stderr),
            "positions": line.positions,
            "losses": [_finite(loss) for loss in line.losses],
            "num_samples": line.num_samples,
        }
    match = barrier.match
    found["matching"] = {
        "moved": match.moved,
        "groups": [asdict(group) for group in match.groups],
        "not_used": dict(match.failed),
        "identity": match.unmatched,
        "distance_before": match.distance_before,
        "distance_after": match.distance_after,
        "loss_changed_by": match.loss_changed_by,
    }
    return found


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None

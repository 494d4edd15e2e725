"""The results as a section in Markdown."""

import json
from collections.abc import Iterator
from pathlib import Path

from bench.gpu.piece import Report

__all__ = ["section"]


def section(folder: Path) -> str:
    """Return a section for docs/results.md from the JSON files of a folder."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not found:
        return ""
    first = next(iter(found.values()))
    lines = [
        "## On a GPU",
        "",
        f"{first['device']}, torch {first['torch']}, commit {first['commit']}:"
        f" `make gpu{' QUICK=1' if first['quick'] else ''}`.",
        "",
        "| piece | seconds | state |",
        "|---|---|---|",
        *(f"| {name} | {report['seconds']:g} | {_state(report)} |" for name, report in found.items()),
    ]
    for name, write in (("heads", _heads), ("timing", _timing), ("curvature", _curvature), ("study", _study)):
        if name in found and found[name]["result"]:
            lines += ["", *write(found[name]["result"])]
    return "\n".join(lines) + "\n"


def _state(report: Report) -> str:
    if "skipped" in report:
        return f"skipped: {report['skipped']}"
    if "error" in report:
        return str(report["error"])
    return "finished" if report["finished"] else "cut off"


def _heads(result: Report) -> Iterator[str]:
    rows = result.get("rows", [])
    names = [key.removesuffix("_ms") for key in rows[0] if key.endswith("_ms")] if rows else []
    yield "### Milliseconds of the heads"
    yield ""
    yield f"| experts × units | precision | batch | {' | '.join(names)} |"
    yield "|---" * (3 + len(names)) + "|"
    for row in rows:
        times = " | ".join("–" if row.get(f"{name}_ms") is None else f"{row[f'{name}_ms']:.3g}" for name in names)
        yield f"| {row['num_experts']} × {row['width']} | {row['dtype']} | {row['batch']} | {times} |"
    if "largest_excess_of_auto" in result:
        yield ""
        yield (
            f'"auto" is within 10 % of the fastest path in {100 * result["share_of_auto_within_10_percent"]:.0f} % of'
            f" the cells, and at most {100 * max(result['largest_excess_of_auto'], 0):.0f} % slower."
        )


def _timing(result: Report) -> Iterator[str]:
    yield "### Inference timing of ResNet-18"
    for head, found in result.items():
        yield ""
        yield f"#### {head}"
        yield ""
        yield found["summary"]


def _curvature(result: Report) -> Iterator[str]:
    yield "### Sharpness of ResNet-18"
    yield ""
    yield "| library | seconds | λmax | trace |"
    yield "|---|---|---|---|"
    for library, found in result.items():
        if "rounds" in found:
            last = found["rounds"][-1]
            yield f"| {library} | {found['median_seconds']:.3g} | {last['lambda_max']:.5g} | {last['trace']:.5g} |"


def _study(result: Report) -> Iterator[str]:
    yield "### One run of the study for each head"
    yield ""
    yield "| head | test accuracy | seconds of training | seconds of analyses |"
    yield "|---|---|---|---|"
    for head, run in result.items():
        if isinstance(run, dict):
            accuracy = run["metrics"]["plain/test/accuracy"]
            times = f"{run['training_seconds']:.0f} | {run['analysis_seconds']:.0f}"
            yield f"| {head} | {100 * accuracy:.2f} % | {times} |"

"""Page of a comparison as HTML without external files, and as Markdown."""

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moe_heads.analysis._shared.tables import markdown_table
from moe_heads.analysis.weight_matching.barrier import LineLoss
from moe_heads.commands.barriers import Barrier
from moe_heads.commands.comparison import Row, Section
from moe_heads.commands.numbers import RULE
from moe_heads.commands.runs import Run

__all__ = ["Page", "html_page", "markdown_page"]

_BARRIER_NOTE = (
    "The barrier is the largest L(t) − ((1 − t) L(0) + t L(1)) along the straight line between two checkpoints, with"
    " its standard error over batches. Matching permutes hidden units, channels, slots, and experts with their router"
    " rows of the second network, which does not change its function: each permutation was checked on the loss of a"
    " batch. Running statistics of batch norm are interpolated like the weights and are not estimated again, which"
    " raises the loss between networks that were trained apart."
)

# Relative size of a barrier that rounding in float32 explains.
_ROUNDING = 1e-6

_STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --head: #f6f8fa; --mark: #fff1c2; --dim: #656d76; }
@media (prefers-color-scheme: dark) {
  :root { --line: #30363d; --head: #161b22; --mark: #4d3b00; --dim: #8b949e; }
  body { background: #0d1117; color: #e6edf3; }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin-bottom: .4rem; }
table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0 1rem; }
th, td { border: 1px solid var(--line); padding: .25rem .7rem; text-align: left; vertical-align: top; }
th { background: var(--head); }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.different td { background: var(--mark); } .dim { color: var(--dim); } code { overflow-wrap: anywhere; }
.note { color: var(--dim); max-width: 52rem; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; } .wide { overflow-x: auto; }
summary { cursor: pointer; color: var(--dim); }
"""


@dataclass(frozen=True)
class Page:
    """Contents of the page.

    Attributes:
        runs: The runs.
        sections: Their numbers.
        barriers: Barriers of their pairs.
        images: Figures as SVG, by name.
    """

    runs: Sequence[Run]
    sections: Sequence[Section]
    barriers: Sequence[Barrier]
    images: Mapping[str, bytes]


def html_page(page: Page) -> str:
    """Return the page as HTML."""
    labels = [run.label for run in page.runs]
    title = html.escape("Comparison of " + ", ".join(labels))
    parts = [f"<h1>{title}</h1>", f"<p>{html.escape(_headline(page))}</p>"]
    parts += ["<h2>Checkpoints</h2>", _runs_html(page.runs)]
    if page.barriers:
        parts += ["<h2>Loss barriers</h2>", _barriers_html(page.barriers), _figures(page, ["barriers"])]
        parts.append(f'<p class="note">{html.escape(_BARRIER_NOTE)}</p>')
    spectra = [name for name in page.images if name.startswith("spectra")]
    if spectra:
        parts += ["<h2>Spectra</h2>", _figures(page, spectra)]
    parts += ["<h2>Numbers</h2>", f'<p class="note">{html.escape(RULE)}</p>']
    parts += [_section_html(section, labels) for section in page.sections]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join(parts)
    head += f"<style>{_STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def markdown_page(page: Page) -> str:
    """Return the page as Markdown, with links to the figures next to it."""
    labels = [run.label for run in page.runs]
    parts = [f"# Comparison of {', '.join(labels)}", _headline(page), "## Checkpoints"]
    parts.append(markdown_table(_RUN_COLUMNS, [_run_cells(run) for run in page.runs]))
    if page.barriers:
        parts += ["## Loss barriers", markdown_table(_BARRIER_COLUMNS, map(_barrier_cells, page.barriers))]
        parts += ["![barriers](barriers.png)"] if "barriers" in page.images else []
        parts.append(_BARRIER_NOTE)
    spectra = [name for name in page.images if name.startswith("spectra")]
    parts += ["## Spectra", *(f"![{name}]({name}.png)" for name in spectra)] if spectra else []
    parts += ["## Numbers", RULE]
    for section in page.sections:
        rows = [[row.name, *_cells(row), _difference(row, labels)] for row in section.rows]
        parts += [f"### {section.analysis}, {section.split} data", *_partial(section)]
        parts.append(markdown_table(("quantity", *labels, "differs"), rows))
    return "\n\n".join(parts) + "\n"


def _headline(page: Page) -> str:
    compared = [row for section in page.sections for row in section.rows if row.compared]
    different = sum(bool(row.different) for row in compared)
    return f"{different} of {len(compared)} quantities with errors differ by more than their errors."


_RUN_COLUMNS = ("name", "checkpoint", "SHA-256", "model", "data", "parameters", "analyzed")


def _run_cells(run: Run) -> list[str]:
    content = run.content
    saved, model = content["checkpoint"], content["model"]
    loss = f" (loss {content['loss']})" if content["loss"] else ""
    return [
        run.label,
        saved["path"],
        saved["sha256"][:12],
        model["name"],
        f"{content['data']}{loss}",
        f"{model['num_parameters']:,}",
        content["created"].replace("T", " ")[:16],
    ]


def _runs_html(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        label, *cells = map(html.escape, _run_cells(run))
        rows.append([label, *(f"<code>{cell}</code>" for cell in cells[:4]), *cells[4:]])
    found = {run.label: run.content["checkpoint"]["unpickled"] for run in runs}
    unpickled = [f"{label}: {', '.join(names)}" for label, names in found.items() if names]
    note = f'<p class="note">Unpickled: {html.escape("; ".join(unpickled))}.</p>' if unpickled else ""
    return _table(_RUN_COLUMNS, rows) + note


_BARRIER_COLUMNS = ("pair", "data", "before matching", "after matching", "moved", "not permuted")


def _barrier_cells(barrier: Barrier) -> list[str]:
    pair = f"{barrier.first} – {barrier.second}"
    if barrier.before is None or barrier.after is None or barrier.match is None:
        return [pair, barrier.split or "–", "–", "–", "–", barrier.reason]
    moved = ", ".join(f"{number} of {size} {kind}" for kind, (number, size) in barrier.match.moved.items())
    kept = [f"{name}: {reason}" for name, reason in barrier.match.failed.items()]
    kept += [f"{', '.join(barrier.match.unmatched)} (no permutation derived)"] if barrier.match.unmatched else []
    values = [_barrier_value(line) for line in (barrier.before, barrier.after)]
    return [pair, barrier.split, *values, moved or "nothing", "; ".join(kept) or "nothing"]


def _barrier_value(line: LineLoss) -> str:
    if line.barrier <= _ROUNDING * max(map(abs, line.losses)):
        return "0 (up to rounding)"
    error = f" ± {line.stderr:.2g}" if math.isfinite(line.stderr) else ""
    return f"{line.barrier:.4g}{error}"


def _barriers_html(barriers: Iterable[Barrier]) -> str:
    rows = [[html.escape(cell) for cell in _barrier_cells(barrier)] for barrier in barriers]
    return _table(_BARRIER_COLUMNS, rows, (2, 3))


def _figures(page: Page, names: Iterable[str]) -> str:
    images = [
        f'<img alt="{name}" src="data:image/svg+xml;base64,{base64.b64encode(page.images[name]).decode()}">'
        for name in names
        if name in page.images
    ]
    return f'<div class="figures">{"".join(images)}</div>'


def _section_html(section: Section, labels: Sequence[str]) -> str:
    main = [row for row in section.rows if row.compared]
    others = [row for row in section.rows if not row.compared]
    parts = [f"<h3>{html.escape(section.analysis)}, {html.escape(section.split)} data</h3>"]
    parts += [f"<p>{html.escape(text)}</p>" for text in _partial(section)]
    if main:
        parts.append(_rows_html(main, labels))
    if others:
        table = _rows_html(others, labels)
        summary = f"<summary>{len(others)} quantities without errors to compare</summary>"
        parts.append(f"<details{'' if main else ' open'}>{summary}{table}</details>")
    return "\n".join(parts)


def _rows_html(rows: Sequence[Row], labels: Sequence[str]) -> str:
    cells = [[html.escape(cell) for cell in (row.name, *_cells(row), _difference(row, labels))] for row in rows]
    marked = [bool(row.different) for row in rows]
    return _table(("quantity", *labels, "differs"), cells, range(1, len(labels) + 1), marked)


def _cells(row: Row) -> list[str]:
    return [_value(value, error) for value, error in zip(row.values, row.errors, strict=True)]


def _value(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    if error is None:
        return f"{value:.5g}"
    if not 1e-6 < error < 1e6:
        return f"{value:.6g} ± {error:.1g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))  # two digits of the error
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _difference(row: Row, labels: Sequence[str]) -> str:
    if not row.compared:
        return ""
    if len(labels) == 2:
        return "yes" if row.different else "no"
    return ", ".join(f"{labels[one]} – {labels[other]}" for one, other in row.different) or "no"


def _partial(section: Section) -> list[str]:
    return [f"Partial, {label}: {reason}." for label, reason in section.partial.items()]


def _table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Iterable[int] = (),
    marked: Sequence[bool] = (),
) -> str:
    """Return an HTML table. The cells are HTML already."""
    right = set(numbers)
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = []
    for place, row in enumerate(rows):
        cells = "".join(
            f'<td class="number">{cell}</td>' if index in right else f"<td>{cell}</td>"
            for index, cell in enumerate(row)
        )
        lines.append(f'<tr class="different">{cells}</tr>' if marked and marked[place] else f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'

"""The study's report: one table, comparison plots, and the figures of the first seed, as markdown."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tensorboard.plugins.hparams import summary_v2 as hparams
from torch.utils.tensorboard import SummaryWriter

from study.options import Options
from study.results import Estimate, estimate

# title, metric, format, scale
COLUMNS = (
    ("test accuracy, %", "test/accuracy", ".2f", 100.0),
    ("calibration error, %", "test/calibration_error", ".2f", 100.0),
    ("λmax train", "sharpness/train/lambda_max", ".3g", 1.0),
    ("λmax test", "sharpness/test/lambda_max", ".3g", 1.0),
    ("trace train", "sharpness/train/trace", ".3g", 1.0),
    ("trace test", "sharpness/test/trace", ".3g", 1.0),
    ("experts in effect", "expert_utilization/train/head/effective_experts", ".2f", 1.0),
    ("head, ms a batch of 256", "inference_timing/test/head/batch256/p50_ms", ".3g", 1.0),
    ("model, ms a batch of 256", "inference_timing/test/model/batch256/p50_ms", ".3g", 1.0),
)

_COLUMNS_SUFFIX = ".columns"

Results = Sequence[dict[str, Any]]


def table(options: Options, results: Results) -> str:
    """One row a head: capacity, then mean ± standard error over the seeds."""
    rows = [["head", "parameters", "active", *(title for title, *_ in COLUMNS)]]
    for head in options.heads:
        runs = [result for result in results if result["head"] == head]
        size = runs[0]["capacity"]
        row = [head, f"{size['total']:,}", f"{size['active']:,}"]
        for _, metric, pattern, scale in COLUMNS:
            found = estimate(runs, metric)
            row.append("–" if found is None else found.format(pattern, scale))
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def write(options: Options, results: Results) -> Path:
    """Write ``results.json``, ``report.md`` and the comparison plots into the study's folder.

    Returns:
        The report.
    """
    _replace(options.out / "results.json", json.dumps(list(results), indent=1))
    _comparison(options, results).savefig(options.out / "comparison.png", dpi=110)
    _lines(options, results).savefig(options.out / "loss_along_eigenvector.png", dpi=110)
    seeds = f"{options.seeds} seed" + ("s" if options.seeds > 1 else "")
    spread = "mean ± standard error over the seeds" if options.seeds > 1 else "one seed, so without error bars"
    sections = [
        f"# {', '.join(options.heads)} on {options.data}",
        f"{options.backbone}, {options.epochs} epochs, {seeds}; {spread}. Curvature and landscape of the cross-entropy"
        f" on up to {options.analysis_samples:,} samples of each split, without augmentation, in evaluation mode; head"
        " latency on this machine, with the load it had.",
        table(options, results),
        "![accuracy, sharpness and latency by head](comparison.png)",
        "![loss along the top eigenvector](loss_along_eigenvector.png)",
        *(_head_section(options, head) for head in options.heads),
        f"Everything interactively: `tensorboard --logdir {options.out}`",
    ]
    report = options.out / "report.md"
    _replace(report, "\n\n".join(sections) + "\n")
    return report


def write_columns(options: Options) -> None:
    """Tell TensorBoard's HPARAMS table its columns, once for the study: it would show every scalar."""
    described = ("head", "seed", "num_head_params", "num_active_head_params")
    summary = hparams.hparams_config_pb(
        hparams=[hparams.HParam(name) for name in described],
        metrics=[hparams.Metric(metric, display_name=title.removesuffix(", %")) for title, metric, *_ in COLUMNS],
    )
    for old in options.out.glob(f"events.out.tfevents.*{_COLUMNS_SUFFIX}"):
        old.unlink()
    with SummaryWriter(options.out, filename_suffix=_COLUMNS_SUFFIX) as writer:
        writer._get_file_writer().add_summary(summary)


def _head_section(options: Options, head: str) -> str:
    folder = options.run_dir(head, seed=0)
    images = [f"![{path.stem}]({path.relative_to(options.out)})" for path in sorted(folder.glob("*.png"))]
    return "\n\n".join([f"## {head}, seed 0, training split", *images])


def _comparison(options: Options, results: Results) -> Figure:
    """A panel a quantity, a point a head with its standard error."""
    panels = (COLUMNS[0], COLUMNS[2], COLUMNS[3], COLUMNS[7])
    figure = Figure(figsize=(3 * len(panels), 3.2), layout="constrained")
    for ax, (title, metric, _, scale) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for position, head in enumerate(options.heads):
            found = estimate([result for result in results if result["head"] == head], metric)
            if found is not None:
                _draw_estimate(ax, position, found, scale)
        ax.set_xticks(range(len(options.heads)), options.heads)
        ax.set_xlim(-0.5, len(options.heads) - 0.5)
        ax.set_title(title, fontsize="medium")
    return figure


def _draw_estimate(ax: Any, position: int, found: Estimate, scale: float) -> None:
    error = None if found.stderr is None else [scale * found.stderr]
    ax.errorbar([position], [scale * found.mean], yerr=error, fmt="o", capsize=4)


def _lines(options: Options, results: Results) -> Figure:
    """Loss along the top eigenvector of each run, a colour a head, a panel a split."""
    splits = list(dict.fromkeys(split for result in results for split in result["lines"]))
    figure = Figure(figsize=(5 * max(len(splits), 1), 3.6), layout="constrained")
    for index, split in enumerate(splits):
        ax = figure.add_subplot(1, len(splits), index + 1)
        for color, head in enumerate(options.heads):
            runs = [result["lines"][split] for result in results if result["head"] == head and split in result["lines"]]
            for number, line in enumerate(runs):
                ax.plot(line["alphas"], line["losses"], color=f"C{color}", label=head if number == 0 else None)
        ax.set(xlabel="α along the unit top eigenvector", ylabel="mean cross-entropy", title=split, yscale="log")
        ax.legend()
    return figure


def _replace(path: Path, text: str) -> None:
    """Write a whole file or leave the old one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)

"""The study's report: verdicts, tables and figures, as markdown and as one HTML file that stands alone."""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markdown import markdown
from tensorboard.plugins.hparams import summary_v2 as hparams
from torch.utils.tensorboard import SummaryWriter

from study import quantities as q
from study.figures import figures
from study.options import Options
from study.results import Run
from study.statistics import correlate
from study.storage import replace
from study.tables import comparison_table, correlation_table, main_table, verdict_table
from study.verdicts import Verdict, comparisons_of, verdicts

# Scalars of a run that TensorBoard's table of runs shows, with their titles there.
_COLUMNS = {
    "test/accuracy": "test accuracy",
    "test/calibration_error": "calibration error",
    "sharpness/train/lambda_max": "λmax train",
    "sharpness/test/lambda_max": "λmax test",
    "sharpness/train/trace": "trace train",
    "sharpness/test/trace": "trace test",
    "expert_utilization/test/head/effective_experts": "experts in effect",
    "inference_timing/test/head/batch256/p50_ms": "head, ms a batch of 256",
    "inference_timing/test/model/batch256/p50_ms": "model, ms a batch of 256",
}
_COLUMNS_SUFFIX = ".columns"

_METHOD = """The unit is the seed; heads are paired by seed, as a seed fixes the backbone's first weights and the order
of the images. Means stand with Student's 95 % interval (geometric means for λ, trace, radius and times, where
differences are factors). p is that of the paired t-test, corrected for all comparisons of the study (Benjamini and
Yekutieli, which holds for dependent tests); d_z is the paired effect size with Hedges' correction. "Above" asks for a
corrected p below 0.05; "alike" for two one-sided tests at 5 % with the margin that is stated. Intervals of rank
correlations draw whole seeds. Curvature and landscape are those of the plain cross-entropy on {samples:,} samples of
each split, without augmentation, in evaluation mode and fp32."""


def write(options: Options, data: dict[str, Any], runs: Sequence[Run]) -> Path:
    """Write ``results.json``, ``report.md``, ``report.html`` and the figures into the study's folder.

    Returns:
        The markdown report.
    """
    replace(options.out / "results.json", json.dumps({"data": data, "runs": list(runs)}, indent=1))
    for name, figure in figures(runs, options.heads).items():
        figure.savefig(options.out / f"{name}.png", dpi=150)
    text = _text(options, data, runs)
    report = options.out / "report.md"
    replace(report, text)
    replace(options.out / "report.html", _page(text, options.out))
    return report


def write_columns(options: Options) -> None:
    """Tell TensorBoard's HPARAMS table its columns, once for the study: it would show every scalar."""
    described = ("head", "seed", "num_head_params", "num_active_head_params")
    summary = hparams.hparams_config_pb(
        hparams=[hparams.HParam(name) for name in described],
        metrics=[hparams.Metric(metric, display_name=title) for metric, title in _COLUMNS.items()],
    )
    for old in options.out.glob(f"events.out.tfevents.*{_COLUMNS_SUFFIX}"):
        old.unlink()
    with SummaryWriter(options.out, filename_suffix=_COLUMNS_SUFFIX) as writer:
        writer._get_file_writer().add_summary(summary)


def _text(options: Options, data: dict[str, Any], runs: Sequence[Run]) -> str:
    num_seeds = len({run["seed"] for run in runs})
    comparisons = comparisons_of(runs, options.heads)
    found = verdicts(runs, comparisons, num_seeds)
    correlations = [correlate(runs, quantity, q.GAP) for quantity in q.SHARPNESS]
    known = [correlation for correlation in correlations if correlation is not None]
    shown = [name for name in (verdict.figure for verdict in found) if (options.out / f"{name}.png").exists()]
    sections = [
        f"# {', '.join(options.heads)} on {_data_title(data)}",
        _setting(options, data, runs, num_seeds),
        "## The claims of arXiv 2601.15021",
        verdict_table(found),
        *(_evidence(verdict, verdict.figure in shown) for verdict in found),
        "## All numbers",
        main_table(runs, options.heads),
        "### Between heads",
        comparison_table(comparisons),
        *(["### Sharpness and generalisation", correlation_table(known)] if known else []),
        "## Method",
        _METHOD.format(samples=options.analysis_samples),
        *(_head_section(options, head) for head in options.heads),
        f"Everything interactively: `tensorboard --logdir {options.out.name}`",
    ]
    return "\n\n".join(sections) + "\n"


def _setting(options: Options, data: dict[str, Any], runs: Sequence[Run], num_seeds: int) -> str:
    machines = [run["machine"] for run in runs]
    told = [
        f"{len(runs)} runs, {num_seeds} seed{'s' if num_seeds != 1 else ''}; preset `{options.preset}`:"
        f" {options.backbone}, {options.epochs} epochs, batches of {options.batch_size}, learning rate"
        f" {options.learning_rate:g} ({options.schedule}), {options.precision},"
        f" {'with' if options.augment else 'without'} augmentation.",
        f"Data: {_data_title(data)}; {data['train']:,} / {data['val']:,} / {data['test']:,} images for training,"
        " validation and test.",
        f"Machine: {_all(machine['name'] for machine in machines)}, {_all(machine['threads'] for machine in machines)}"
        f" threads a process; Python {_all(machine['python'] for machine in machines)},"
        f" torch {_all(machine['packages']['torch'] for machine in machines)},"
        f" lightning {_all(machine['packages']['lightning'] for machine in machines)};"
        f" commit {_all(machine['commit'] for machine in machines)}.",
        f"Training took {_range([run['training_seconds'] / 60 for run in runs])} minutes a run, with validation; a run"
        f" with its analyses in one piece {_range([run['seconds'] / 60 for run in runs])}.",
    ]
    return "\n".join(f"- {line}" for line in told)


def _data_title(data: dict[str, Any]) -> str:
    names = {"digits": "the digits of scikit-learn", "cifar10": "CIFAR-10", "imagefolder": "a folder of images"}
    files = "".join(f" ({', '.join(data['files'])} files)" if data["files"] else "")
    return names[data["kind"]] + files


def _evidence(verdict: Verdict, is_drawn: bool) -> str:
    marks = {True: "held up", False: "refuted", None: "open"}
    lines = [f"### {verdict.number}. {verdict.claim}", f"Verdict: **{verdict.outcome}**."]
    lines.append("\n".join(f"- {statement.text}: {marks[statement.is_true]}." for statement in verdict.statements))
    if is_drawn:
        lines.append(f"![{verdict.figure}]({verdict.figure}.png)")
    return "\n\n".join(lines)


def _head_section(options: Options, head: str) -> str:
    folder = options.run_dir(head, seed=0)
    images = [f"![{path.stem}]({path.relative_to(options.out)})" for path in sorted(folder.glob("*.png"))]
    return "\n\n".join([f"## {head}, seed 0", *images])


def _page(text: str, folder: Path) -> str:
    """The report as one HTML file with its pictures inside."""
    body = markdown(text, extensions=["tables"])
    for path in sorted(folder.rglob("*.png")):
        name = html.escape(path.relative_to(folder).as_posix(), quote=True)
        data = base64.b64encode(path.read_bytes()).decode()
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{data}"')
    title = html.escape(text.partition("\n")[0].removeprefix("# "))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n<style>{_STYLE}</style>'
        f"</head>\n<body>\n{body}\n</body></html>\n"
    )


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.6rem; text-align: left; vertical-align: top; }
img { max-width: 100%; }
code { background: #f3f3f3; padding: 0 0.2rem; }
"""


def _all(values: Any) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"

"""Report of the study with verdicts, tables and figures, in Markdown and as one self-contained HTML file."""

import base64
import html
import json
import shlex
from collections.abc import Container, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from markdown import markdown
from tensorboard.plugins.hparams import summary_v2 as hparams
from torch.utils.tensorboard import SummaryWriter

from study import quantities as q
from study.claims import RULES, comparisons_of, verdicts
from study.figures import FIGURES, figures
from study.options import Options
from study.presets import PRESETS, Protocol
from study.results import Run, heads_of
from study.rules import Verdict
from study.statistics import correlate
from study.storage import replace, save_figure
from study.tables import comparison_table, correlation_table, main_table, verdict_table

# Scalars of a run in TensorBoard's HPARAMS table, with their titles.
_COLUMNS = {
    "test/accuracy": "test accuracy",
    "test/calibration_error": "calibration error",
    "sharpness/train/lambda_max": "λmax train",
    "sharpness/test/lambda_max": "λmax test",
    "sharpness/train/trace": "trace train",
    "sharpness/test/trace": "trace test",
    "expert_utilization/test/head/effective_experts": "effective experts",
    "inference_timing/test/head/batch256/p50_ms": "head, ms for a batch of 256",
    "inference_timing/test/model/batch256/p50_ms": "model, ms for a batch of 256",
}
_COLUMNS_SUFFIX = ".columns"
_LINE_CHECK = "loss_landscape/train/line_curvature_1_agrees"

_METHOD = """The unit of observation is the seed. Heads are paired by seed, which fixes the initial weights of the
backbone and the split of the data. The order and augmentation of the images differ between heads from the first step
on, since heads draw their own random numbers. Means have Student's 95 % interval. They are geometric means for λ,
trace, radius, loss increase and times, whose differences are factors. p is the p-value of the paired t-test. The tests
of "above" that decide a claim are corrected together by the method of Benjamini and Yekutieli, which is valid for
dependent tests. Other rows of the comparison table and the tests of "equivalent" (two one-sided tests at 5 % against
the stated margin) are not corrected. d_z is the paired effect size with Hedges' correction, computed from logarithms
for factors. Intervals of rank correlations resample whole seeds and keep the heads. They show the stability of the
order of these heads and do not generalize to other heads. *ρ within heads* is the correlation after subtracting each
head's mean.

Losses and accuracies are computed on the whole split, without augmentation, in evaluation mode and fp32. Curvature and
landscape are computed in the same way for the plain cross-entropy on {samples:,} samples. The line of the landscape is
that of the paper: 21 points up to 0.5 along the unit top eigenvector of each head. The sign of an eigenvector is
arbitrary, and the figure orients every line so that its higher end is on the right. *Fixed routing* (dashed): every
sample keeps its experts of α = 0. The *parabola* is ½ λmax α². The loss is interpolated linearly between points, which
limits the resolution of the radius. {line_check}

A dense head has one hidden layer. Soft and sparse heads have a router and experts with one hidden layer each. The soft
head runs and mixes all experts, the sparse head runs two for each sample, and the hard head one. *Active* parameters
are those used for one sample. The load of an expert is its share of the assignments, or of the mixing weights for the
soft head. Its *fair share* is 1/E. *Effective experts* is the exponential of the entropy of these weights, which is E
for uniform weights. The *calibration error* is the expected difference of confidence and accuracy in 15 bins
(torchmetrics).

Times are medians of forward passes in evaluation mode. Times of different runs were taken under different load of the
machine and are not compared. Model, head and dense head of equal capacity are timed in turns in one process. The *speed
of the model* is its time with the dense head in place of its own head, divided by its time."""


def write(options: Options, data: dict[str, Any], runs: Sequence[Run]) -> Path:
    """Write ``results.json``, ``report.md``, ``report.html`` and the figures into the study's folder.

    Returns:
        The markdown report.
    """
    replace(options.out / "results.json", json.dumps({"data": data, "runs": list(runs)}, indent=1))
    drawn = figures(runs)
    for name in FIGURES:
        if name not in drawn:
            (options.out / f"{name}.png").unlink(missing_ok=True)
    for name, figure in drawn.items():
        save_figure(options.out / f"{name}.png", figure)
    text = _text(options, data, runs, drawn)
    report = options.out / "report.md"
    replace(report, text)
    replace(options.out / "report.html", _page(text, options.out))
    return report


def write_columns(options: Options) -> None:
    """Define the columns of TensorBoard's HPARAMS table once for the study; by default it shows every scalar."""
    described = ("head", "seed", "num_head_params", "num_active_head_params")
    summary = hparams.hparams_config_pb(
        hparams=[hparams.HParam(name) for name in described],
        metrics=[hparams.Metric(metric, display_name=title) for metric, title in _COLUMNS.items()],
    )
    for old in options.out.glob(f"events.out.tfevents.*{_COLUMNS_SUFFIX}"):
        old.unlink(missing_ok=True)
    with SummaryWriter(options.out, filename_suffix=_COLUMNS_SUFFIX) as writer:
        writer._get_file_writer().add_summary(summary)


def _text(options: Options, data: dict[str, Any], runs: Sequence[Run], drawn: Container[str]) -> str:
    heads = heads_of(runs)
    comparisons = comparisons_of(runs, heads)
    found = verdicts(runs, comparisons)
    correlations = [correlate(runs, quantity, q.GAP) for quantity in q.SHARPNESS]
    known = [correlation for correlation in correlations if correlation is not None]
    sections = [
        f"# {', '.join(heads)} on {_data_title(data)}",
        _setting(options, data, runs),
        "## Claims of arXiv 2601.15021",
        verdict_table(found),
        *(_evidence(verdict, verdict.figure in drawn) for verdict in found),
        "## All numbers",
        main_table(runs),
        *(["### Comparison of heads", comparison_table(comparisons)] if comparisons else []),
        *(["### Sharpness and generalization", correlation_table(known)] if known else []),
        "## Decision rules",
        RULES,
        "## Method",
        _METHOD.format(samples=options.analysis_samples, line_check=_line_check(runs)),
        "Full protocol: " + ", ".join(f"{name} {value}" for name, value in runs[0]["config"].items()) + ".",
        *filter(None, (_head_section(options, run["head"]) for run in runs if run["seed"] == 0)),
        f"Interactive results: `tensorboard --logdir {options.out.name}`",
    ]
    return "\n\n".join(sections) + "\n"


def _setting(options: Options, data: dict[str, Any], runs: Sequence[Run]) -> str:
    machines = [run["machine"] for run in runs]
    counts = {head: sum(run["head"] == head for run in runs) for head in heads_of(runs)}
    lines = [
        f"Runs: {', '.join(f'{count} {head}' for head, count in counts.items())}. Preset `{options.preset}`:"
        f" {options.backbone}, {options.epochs} epochs, batches of {options.batch_size}, learning rate"
        f" {options.learning_rate:g} ({options.schedule}), {'with' if options.augment else 'without'} augmentation,"
        f" precision {_all(machine['precision'] for machine in machines)}.",
        *_warnings(options),
        f"Data: {_data_title(data)}; {data['train']:,} / {data['val']:,} / {data['test']:,} images for training,"
        " validation and test.",
        f"Machine: {_all(machine['name'] for machine in machines)}, threads per process:"
        f" {_all(machine['threads'] for machine in machines)};"
        f" Python {_all(machine['python'] for machine in machines)},"
        f" torch {_all(machine['packages']['torch'] for machine in machines)},"
        f" lightning {_all(machine['packages']['lightning'] for machine in machines)};"
        f" commit {_all(machine['commit'] for machine in machines)}.",
        f"Minutes per run: {_range([run['training_seconds'] / 60 for run in runs])} for training with validation,"
        f" {_range([run['analysis_seconds'] / 60 for run in runs])} for analyses.",
        f"Command: `{_command(options)}`",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _warnings(options: Options) -> list[str]:
    """Return warnings about options that affect the interpretation of the numbers."""
    warnings = []
    if options.engine == "pyhessian":
        warnings.append("Curvature by PyHessian with its own stopping rule: its eigenvalues may not have converged.")
    if options.load_loss == "importance":
        warnings.append("The load loss equals the importance loss, as in the published code.")
    return warnings


def _command(options: Options) -> str:
    """Return the command line without paths of this machine."""
    protocol = PRESETS[options.preset]
    parts = ["python examples/compare_heads.py", f"--preset {options.preset}"]
    for field in fields(Protocol):
        value = getattr(options, field.name)
        if field.name == "data" and value.startswith("imagefolder:"):
            parts.append("--data imagefolder:PATH")
        elif value != getattr(protocol, field.name):
            flag = field.name.replace("_", "-")
            if isinstance(value, bool):
                parts.append(f"--{'' if value else 'no-'}{flag}")
            else:
                parts.append(f"--{flag} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
    if options.data_name is not None:
        parts.append(f"--data-name {shlex.quote(options.data_name)}")
    return " ".join(parts)


def _data_title(data: dict[str, Any]) -> str:
    names = {"digits": "the digits of scikit-learn", "cifar10": "CIFAR-10"}
    files = f"{', '.join(data['files'])} files of {data['num_classes']} classes"
    if data["kind"] in names:
        return data["name"] or names[data["kind"]]
    return f"{data['name']} ({files})" if data["name"] else f"a folder of images ({files})"


def _evidence(verdict: Verdict, is_drawn: bool) -> str:
    marks = {True: "supported", False: "contradicted", None: "undecided"}
    lines = [f"### {verdict.number}. {verdict.claim}", f"Verdict: **{verdict.outcome}**."]
    lines.append("\n".join(f"- {statement.text}: {marks[statement.is_true]}." for statement in verdict.statements))
    if is_drawn:
        lines.append(f"![{verdict.figure}]({verdict.figure}.png)")
    return "\n\n".join(lines)


def _line_check(runs: Sequence[Run]) -> str:
    """Report in how many runs the second difference of the line agrees with the eigenvalue."""
    found = [value for run in runs if (value := run["metrics"].get(_LINE_CHECK)) is not None]
    if not found:
        return ""
    return (
        f"The second difference of its three middle points agrees with λmax in {sum(map(bool, found))} of"
        f" {len(found)} runs. In the others, the loss is not a parabola over one step of the line."
    )


def _head_section(options: Options, head: str) -> str:
    folder = options.run_dir(head, seed=0)
    images = [f"![{path.stem}]({path.relative_to(options.out)})" for path in sorted(folder.glob("*.png"))]
    return "\n\n".join([f"## {head}, seed 0", *images]) if images else ""


def _page(text: str, folder: Path) -> str:
    """Render the report as one HTML file with embedded figures."""
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
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"

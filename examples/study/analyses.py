"""The analyses of a trained run, each kept in the run's folder as soon as it is done."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from lightning import pytorch as pl
from lightning.pytorch import Callback
from torch import Tensor
from typing_extensions import override

from moe_heads.callbacks import (
    ExpertUtilizationCallback,
    FitEndAnalysis,
    InferenceTimingCallback,
    LossLandscapeCallback,
    SharpnessCallback,
)
from study.options import Options
from study.storage import replace, save_figure
from study.training import Deadline

_FOLDER = "analyses"


class Found(TypedDict):
    """What is kept of an analysis.

    Attributes:
        weights: Digest of the weights that were analyzed.
        seconds: How long it took, in the piece that ended it.
        metrics: Its numbers by name; finite ones.
        lines: Loss along the top eigenvector by split, and with the routing held fixed.
        loads: Hard load and importance of every expert of the head, by split.
    """

    weights: str
    seconds: float
    metrics: dict[str, float]
    lines: dict[str, dict[str, list[float | None]]]
    loads: dict[str, dict[str, list[float]]]


def folder_of(run: Path, machine: Mapping[str, Any]) -> Path:
    """Where a run keeps what it has found before it is finished.

    One for each machine, version and commit: a result names one, so all of its numbers have to come from there.
    """
    return run / _FOLDER / hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:16]


def forget(run: Path) -> None:
    """Remove what was kept of a run that is finished."""
    shutil.rmtree(run / _FOLDER, ignore_errors=True)


def analyses_of(options: Options, kept: Path) -> list[FitEndAnalysis]:
    """All analyses of a run; the landscape keeps its points in the folder of what is kept."""
    analyzed = {"num_samples": options.analysis_samples}
    return [
        SharpnessCallback(engine=options.engine, **analyzed),
        LossLandscapeCallback(plane_points=options.plane_points, resume=kept, **analyzed),
        ExpertUtilizationCallback(),
        InferenceTimingCallback(),
    ]


def found_in(kept: Path, weights: Mapping[str, Tensor]) -> dict[str, Found]:
    """What was found on these weights, by the name of the analysis.

    Raises:
        RuntimeError: Names the file that cannot be read, and what to do.
    """
    digest, found = _digest(weights), {}
    for path in sorted(kept.glob("*.json")):
        try:
            analysis: Found = json.loads(path.read_text(encoding="utf-8"))
            is_of_these = analysis["weights"] == digest
        except (ValueError, TypeError, KeyError) as error:
            raise RuntimeError(f"{path} is damaged ({error}); remove it to repeat this analysis") from error
        if is_of_these:
            found[path.stem] = analysis
    return found


class Keeper(Callback):
    """Stands behind an analysis: keeps what it found, then sees whether there is time for what follows.

    An analysis that was cut short or failed is not kept. Ctrl-C in an analysis ends the study, as in the training.

    Args:
        analysis: The one before it in the Trainer's list.
        gate: Says when time is up.
        kept: Folder for what is found.
        figures: Folder for the figures of one split, for the report; None for no figures.

    Attributes:
        has_failed: Whether the analysis ended without a whole result.
    """

    def __init__(self, analysis: FitEndAnalysis, gate: Deadline, kept: Path, figures: Path | None) -> None:
        self.analysis, self.has_failed = analysis, False
        self._gate, self._kept, self._figures = gate, kept, figures

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._gate.began is not None
        seconds = time.perf_counter() - self._gate.began
        if _is_whole(self.analysis):
            self._keep(_digest(pl_module.state_dict()), seconds)
        else:
            self.has_failed = True
        if self.analysis.was_interrupted:
            raise KeyboardInterrupt
        self._gate.begin(f"trained, and analyzed as far as {self.analysis.name}")

    def _keep(self, weights: str, seconds: float) -> None:
        analysis = self.analysis
        reports = {split: analysis.report(result) for split, result in analysis.results.items()}
        named = {
            f"{analysis.name}/{split}/{quantity}": float(value)
            for split, report in reports.items()
            for quantity, value in report.metrics.items()
        }
        found: Found = {
            "weights": weights,
            "seconds": seconds,
            "metrics": {name: value for name, value in named.items() if math.isfinite(value)},
            "lines": _lines(analysis) if isinstance(analysis, LossLandscapeCallback) else {},
            "loads": _loads(analysis) if isinstance(analysis, ExpertUtilizationCallback) else {},
        }
        shown = reports.get("train", reports.get("test"))
        if self._figures is not None and shown is not None:
            for name, figure in shown.figures.items():
                save_figure(self._figures / f"{analysis.name}_{name.replace('/', '_')}.png", figure)
        self._kept.mkdir(parents=True, exist_ok=True)
        replace(self._kept / f"{analysis.name}.json", json.dumps(found))


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _is_whole(analysis: FitEndAnalysis) -> bool:
    results = analysis.results
    return set(results) == set(analysis.splits) and not any(result.partial for result in results.values())


def _lines(landscape: LossLandscapeCallback) -> dict[str, dict[str, list[float | None]]]:
    lines = {}
    for split, result in landscape.results.items():
        if result.line is None:
            continue
        columns = {
            "alphas": result.line.alphas,
            "losses": result.line.losses,
            "losses_fixed_routing": result.line.losses_fixed_routing,
            "routing_flips": result.line.routing_flips,
        }
        lines[split] = {name: _finite(values.tolist()) for name, values in columns.items() if values is not None}
    return lines


def _finite(values: Sequence[float]) -> list[float | None]:
    """JSON has no infinity."""
    return [value if math.isfinite(value) else None for value in values]


def _loads(utilization: ExpertUtilizationCallback) -> dict[str, dict[str, list[float]]]:
    return {
        split: {"load": found.load.tolist(), "importance": found.importance.tolist()}
        for split, result in utilization.results.items()
        for found in result.heads.values()
    }

"""Analyses of a trained run, each saved in the run's folder as soon as it is finished."""

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


class SavedAnalysis(TypedDict):
    """Saved results of one analysis.

    Attributes:
        weights: Digest of the analyzed weights.
        seconds: Run time of the analysis in the process that finished it.
        metrics: Finite metrics by name.
        lines: Loss along the top eigenvector by split, with free and with fixed routing.
        loads: Hard load and importance of every expert of the head, by split.
    """

    weights: str
    seconds: float
    metrics: dict[str, float]
    lines: dict[str, dict[str, list[float | None]]]
    loads: dict[str, dict[str, list[float]]]


def folder_of(run: Path, machine: Mapping[str, Any]) -> Path:
    """Return the folder for the saved analyses of an unfinished run.

    Each machine, version and commit has its own folder: a result names one machine, so all its numbers have to come
    from it.
    """
    return run / _FOLDER / hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:16]


def remove_saved(run: Path) -> None:
    """Remove the saved analyses of a finished run."""
    shutil.rmtree(run / _FOLDER, ignore_errors=True)


def analyses_of(options: Options, folder: Path) -> list[FitEndAnalysis]:
    """Create all analyses of a run; the landscape saves its points in the folder."""
    num_samples = options.analysis_samples
    return [
        SharpnessCallback(engine=options.engine, num_samples=num_samples),
        LossLandscapeCallback(plane_points=options.plane_points, resume=folder, num_samples=num_samples),
        ExpertUtilizationCallback(),
        InferenceTimingCallback(),
    ]


def saved_in(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, SavedAnalysis]:
    """Read the saved analyses of these weights, by the name of the analysis.

    Raises:
        RuntimeError: If a file cannot be read.
    """
    digest, found = _digest(weights), {}
    for path in sorted(folder.glob("*.json")):
        try:
            analysis: SavedAnalysis = json.loads(path.read_text(encoding="utf-8"))
            is_of_these = analysis["weights"] == digest
        except (ValueError, TypeError, KeyError) as error:
            raise RuntimeError(f"{path} is damaged: {error}. Remove it to repeat this analysis.") from error
        if is_of_these:
            found[path.stem] = analysis
    return found


class AnalysisCheckpoint(Callback):
    """A callback after an analysis that saves its results and then checks the deadline.

    A partial or failed analysis is not saved. Ctrl-C in an analysis ends the study, as in training.

    Args:
        analysis: The analysis directly before it in the Trainer's list of callbacks.
        deadline: Raises `TimeIsUp` after the time limit.
        folder: Folder for the results.
        figures: Folder for the figures of one split for the report; None for no figures.

    Attributes:
        has_failed: Whether the analysis ended without a complete result.
    """

    def __init__(self, analysis: FitEndAnalysis, deadline: Deadline, folder: Path, figures: Path | None) -> None:
        self.analysis, self.has_failed = analysis, False
        self._deadline, self._folder, self._figures = deadline, folder, figures

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._deadline.began is not None
        seconds = time.perf_counter() - self._deadline.began
        if _is_complete(self.analysis):
            self._save(_digest(pl_module.state_dict()), seconds)
        else:
            self.has_failed = True
        if self.analysis.was_interrupted:
            raise KeyboardInterrupt
        self._deadline.begin(f"trained, and analyzed up to {self.analysis.name}")

    def _save(self, weights: str, seconds: float) -> None:
        analysis = self.analysis
        reports = {split: analysis.report(result) for split, result in analysis.results.items()}
        named = {
            f"{analysis.name}/{split}/{quantity}": float(value)
            for split, report in reports.items()
            for quantity, value in report.metrics.items()
        }
        saved: SavedAnalysis = {
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
        self._folder.mkdir(parents=True, exist_ok=True)
        replace(self._folder / f"{analysis.name}.json", json.dumps(saved))


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _is_complete(analysis: FitEndAnalysis) -> bool:
    results = analysis.results
    return set(results) == set(analysis.splits) and not any(result.partial for result in results.values())


def _lines(landscape: LossLandscapeCallback) -> dict[str, dict[str, list[float | None]]]:
    lines: dict[str, dict[str, list[float | None]]] = {}
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
    """Replace infinity and nan, which JSON does not support, by None."""
    return [value if math.isfinite(value) else None for value in values]


def _loads(utilization: ExpertUtilizationCallback) -> dict[str, dict[str, list[float]]]:
    return {
        split: {"load": found.load.tolist(), "importance": found.importance.tolist()}
        for split, result in utilization.results.items()
        for found in result.heads.values()
    }

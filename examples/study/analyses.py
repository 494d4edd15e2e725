"""The analyses of a trained run, each kept in the run's folder as soon as it is done."""

import hashlib
import json
import math
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

FOLDER = "analyses"
"""Of what a run has found before it is finished, in the run's folder."""


class Found(TypedDict):
    """What is kept of an analysis.

    Attributes:
        weights: Digest of the weights that were analysed.
        seconds: How long it took.
        metrics: What was logged, by name.
        lines: Loss along the top eigenvector by split, and with the routing held fixed.
        loads: Hard load and importance of every expert of the head, by split.
    """

    weights: str
    seconds: float
    metrics: dict[str, float]
    lines: dict[str, dict[str, list[float | None]]]
    loads: dict[str, dict[str, list[float]]]


def analyses_of(options: Options, folder: Path) -> list[FitEndAnalysis]:
    """All analyses of the run in a folder."""
    analysed = {"num_samples": options.analysis_samples}
    return [
        SharpnessCallback(engine=options.engine, **analysed),
        LossLandscapeCallback(plane_points=options.plane_points, resume=folder / FOLDER, **analysed),
        ExpertUtilizationCallback(),
        InferenceTimingCallback(),
    ]


def found_before(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, Found]:
    """What earlier pieces of a run have found on these weights, by the name of the analysis.

    Raises:
        RuntimeError: Names the file that cannot be read, and what to do.
    """
    digest, found = _digest(weights), {}
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            kept: Found = json.loads(path.read_text(encoding="utf-8"))
            is_of_these = kept["weights"] == digest
        except (ValueError, TypeError, KeyError) as error:
            raise RuntimeError(f"{path} is damaged ({error}); remove it to repeat this analysis") from error
        if is_of_these:
            found[path.stem] = kept
    return found


class Keeper(Callback):
    """Stands behind an analysis: keeps what it found, then sees whether there is time for what follows.

    An analysis that was cut short or failed is not kept.

    Args:
        analysis: The one before it in the Trainer's list.
        gate: Says when time is up.
        folder: Of the run.
        with_figures: Also save the figures of the training split as files there.
    """

    def __init__(self, analysis: FitEndAnalysis, gate: Deadline, folder: Path, with_figures: bool) -> None:
        self.found: Found | None = None
        self.analysis = analysis
        self._gate, self._folder, self._with_figures = gate, folder, with_figures

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seconds = time.perf_counter() - self._gate.began
        if _is_whole(self.analysis):
            self._keep(trainer, _digest(pl_module.state_dict()), seconds)
        self._gate.begin(f"trained, and analysed as far as {self.analysis.name}")

    def _keep(self, trainer: pl.Trainer, weights: str, seconds: float) -> None:
        # what was logged while training is not known to a later piece
        logged = tuple(f"{self.analysis.name}/{split}/" for split in self.analysis.results)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(logged)}
        self.found = {
            "weights": weights,
            "seconds": seconds,
            "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
            "lines": _lines(self.analysis) if isinstance(self.analysis, LossLandscapeCallback) else {},
            "loads": _loads(self.analysis) if isinstance(self.analysis, ExpertUtilizationCallback) else {},
        }
        if self._with_figures:
            _save_figures(self._folder, self.analysis)
        path = self._folder / FOLDER / f"{self.analysis.name}.json"
        path.parent.mkdir(exist_ok=True)
        replace(path, json.dumps(self.found))


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


def _save_figures(folder: Path, analysis: FitEndAnalysis) -> None:
    """For the report, which shows those of the first seed."""
    result: Any = next((analysis.results[split] for split in ("train", "test") if split in analysis.results), None)
    for name, figure in {} if result is None else analysis.report(result).figures.items():
        save_figure(folder / f"{analysis.name}_{name.replace('/', '_')}.png", figure)

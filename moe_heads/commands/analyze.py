"""Command ``analyze``: run the analyses of the callbacks on a checkpoint and store their results."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from moe_heads.analysis import SharpnessResult
from moe_heads.analysis._shared.environment import environment_of
from moe_heads.callbacks import (
    ExpertUtilizationCallback,
    FitEndAnalysis,
    InferenceTimingCallback,
    LossLandscapeCallback,
    SharpnessCallback,
)
from moe_heads.callbacks._shared.analysis import described
from moe_heads.callbacks._shared.evaluation import loss_of
from moe_heads.commands.checkpoints import LoadedModel, load_model
from moe_heads.commands.errors import CommandError, check_device
from moe_heads.commands.folders import check_free, new_folder
from moe_heads.commands.import_names import import_object
from moe_heads.commands.loaders import check_loss, load_data, loaders_for
from moe_heads.commands.numbers import errors_of

__all__ = ["ANALYSES", "FORMAT", "RESULT", "AnalyzeOptions", "Analyzed", "analyze_checkpoint"]

ANALYSES: Mapping[str, type[FitEndAnalysis]] = {
    "sharpness": SharpnessCallback,
    "loss_landscape": LossLandscapeCallback,
    "expert_utilization": ExpertUtilizationCallback,
    "inference_timing": InferenceTimingCallback,
}
"""Callbacks by the name of the analysis."""

FORMAT = 1
"""Format of ``result.json``."""

RESULT = "result.json"
"""Name of the file with the numbers."""

_PACKAGES = ("moe-heads", "torch", "lightning", "numpy", "scipy")


@dataclass(frozen=True)
class AnalyzeOptions:
    """Options of the command.

    Attributes:
        ckpt: Path of the checkpoint.
        model: Import name of the model.
        data: Import name of the data.
        analyses: Names of the analyses, separated by commas.
        out: Folder of the results.
        loss: Import name of ``loss_fn(model, batch)``, or None.
        device: Device of the analyses, or None for the CPU.
        unpickle: Whether to load objects other than tensors and plain data.
        overwrite: Whether to replace earlier results.
    """

    ckpt: str
    model: str
    data: str
    out: str
    analyses: str = "sharpness"
    loss: str | None = None
    device: str | None = None
    unpickle: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Analyzed:
    """Results of the command.

    Attributes:
        folder: Folder of the results.
        failed: Errors of the analyses that failed, by name.
    """

    folder: Path
    failed: Mapping[str, Exception]


def analyze_checkpoint(options: AnalyzeOptions, arguments: Mapping[str, Mapping[str, Any]]) -> Analyzed:
    """Analyze a checkpoint and store the results of all analyses that did not fail.

    Args:
        options: Options of the command.
        arguments: Arguments of the callback by the name of the analysis.

    Raises:
        CommandError: If an option is invalid, or the checkpoint, the model and the data do not fit together.
        Exception: The error of the first analysis, if all failed.
    """
    names = _checked_names(options.analyses)
    out = Path(options.out)
    check_free(out, overwrite=options.overwrite)
    check_device(options.device)
    loss_fn = None if options.loss is None else import_object("--loss", options.loss)
    callbacks = {name: _callback(name, arguments.get(name, {}), loss_fn) for name in names}
    loaded = load_model(options.model, Path(options.ckpt), unpickle=options.unpickle)
    loaders = load_data(options.data)
    given = {name: loaders_for(callback.splits, callback.fallbacks, loaders) for name, callback in callbacks.items()}
    for name, callback in callbacks.items():
        if not given[name]:
            raise CommandError(f"--data: expected {' or '.join(callback.splits)} data for {name}, got {list(loaders)}.")
        if callback.needs_loss:
            check_loss(loaded.model, loss_of(loaded.model, callback.loss_fn), given[name])
    with new_folder(out, marker=RESULT, overwrite=options.overwrite) as folder:
        found, failed = {}, {}
        for name, callback in callbacks.items():
            try:
                results = callback.analyze(loaded.model, **given[name], device=options.device)
            except Exception as error:  # any error of the user's model; the results of other analyses are kept
                failed[name] = error
                continue
            found[name] = {split: _store(folder, name, split, callback, result) for split, result in results.items()}
        if not found:
            raise next(iter(failed.values()))
        reasons = {name: described(error) for name, error in failed.items()}
        content = {
            **_origin(options, loaded),
            "options": _plain(arguments, names),
            "analyses": found,
            "failed": reasons,
        }
        (folder / RESULT).write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    return Analyzed(out, failed)


def _checked_names(listed: str) -> list[str]:
    names = [name.strip() for name in listed.split(",") if name.strip()]
    unknown = [name for name in names if name not in ANALYSES]
    if unknown or not names:
        got = ", ".join(map(repr, unknown)) or "none"
        raise CommandError(f"--analyses: expected some of {', '.join(ANALYSES)}, separated by commas, got {got}.")
    return list(dict.fromkeys(names))


def _callback(name: str, arguments: Mapping[str, Any], loss_fn: Callable[..., Any] | None) -> FitEndAnalysis:
    kind = ANALYSES[name]
    given = dict(arguments)
    if loss_fn is not None and kind.needs_loss and given.get("loss_fn") is None:
        given["loss_fn"] = loss_fn
    return kind(**given)


def _store(folder: Path, name: str, split: str, callback: FitEndAnalysis, result: Any) -> dict[str, Any]:
    """Write the report of one split into its folder, and return its entry in the file of numbers."""
    report = callback.report(result)
    place = folder / name / split
    place.mkdir(parents=True)
    files: dict[str, bytes] = dict(report.files)
    files |= {f"{key}.md": (text + "\n").encode() for key, text in report.texts.items()}
    files |= {f"{key}.png": _png(figure) for key, figure in report.figures.items()}
    if isinstance(result, SharpnessResult):
        files["spectrum.npz"] = _spectrum(result)
    for key, data in files.items():
        path = place / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return {
        "metrics": {key: float(value) for key, value in report.metrics.items()},
        "errors": dict(errors_of(result)),
        "partial": getattr(result, "partial", ""),
        "files": sorted(files),
    }


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _spectrum(result: SharpnessResult) -> bytes:
    arrays: dict[str, Any] = {"eigenvalues": result.eigenvalues, "residuals": result.residuals}
    if result.density is not None:
        density = result.density
        arrays |= {name: getattr(density, name).numpy() for name in ("grid", "values", "stderr", "nodes", "weights")}
        arrays["sigma"] = density.sigma
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _origin(options: AnalyzeOptions, loaded: LoadedModel) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": {
            "path": loaded.checkpoint,
            "sha256": loaded.checkpoint_digest,
            "unpickled": list(loaded.unpickled),
        },
        "model": {
            "name": options.model,
            "weights_sha256": loaded.weights_digest,
            "num_parameters": _num_parameters(loaded.model),
        },
        "data": options.data,
        "loss": options.loss,
        "machine": asdict(environment_of(loaded.model)),
        "versions": {package: _version(package) for package in _PACKAGES},
    }


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _plain(arguments: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {name: dict(arguments.get(name, {})) for name in names}

"""Loss barriers between pairs of checkpoints, before and after matching their weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import override

from moe_heads.analysis.weight_matching.barrier import LineLoss, line_loss, mean_loss
from moe_heads.analysis.weight_matching.function import match_weights
from moe_heads.analysis.weight_matching.result import WeightMatch
from moe_heads.analysis.weight_matching.tensors import tensors_of, unequal_shapes
from moe_heads.callbacks import AnalysisInputs, Report
from moe_heads.callbacks._shared.analysis import Analysis
from moe_heads.commands.checkpoints import LoadedModel, load_model
from moe_heads.commands.errors import CommandError, one_sentence
from moe_heads.commands.import_names import import_object
from moe_heads.commands.loaders import Loaders, load_data
from moe_heads.commands.runs import Run

__all__ = ["Barrier", "BarrierOptions", "barriers_of"]

# Relative difference of a loss that two modules with the same weights may have.
_SAME_LOSS = 1e-4


@dataclass(frozen=True)
class BarrierOptions:
    """Options of the barriers.

    Attributes:
        num_samples: Number of samples of each split.
        num_points: Number of positions on the line.
        seed: Seed of the samples and of the matching.
        device: Device, or None for the CPU.
        unpickle: Whether to load objects other than tensors and plain data from checkpoints.
    """

    num_samples: int = 1000
    num_points: int = 11
    seed: int = 0
    device: str | None = None
    unpickle: bool = False


@dataclass(frozen=True)
class Barrier:
    """Barrier between two checkpoints on one split, or the reason why there is none.

    Attributes:
        first: Label of the first.
        second: Label of the second.
        split: The split; "" if there is no barrier.
        reason: Why there is no barrier, or "".
        before: Loss along the line to the second network.
        after: Loss along the line to the permuted second network.
        match: The permutation.
    """

    first: str
    second: str
    split: str = ""
    reason: str = ""
    before: LineLoss | None = None
    after: LineLoss | None = None
    match: WeightMatch | None = None


def barriers_of(runs: list[Run], options: BarrierOptions) -> list[Barrier]:
    """Return the barriers of all pairs of runs on the splits that both have analyzed."""
    models: dict[str, LoadedModel | str] = {run.label: _load(run, options) for run in runs}
    data: dict[str, Loaders | str] = {name: _data(name) for name in {str(run.content["data"]) for run in runs}}
    found = []
    for first, second in combinations(runs, 2):
        reason = _reason(first, second, models, data)
        if reason:
            found.append(Barrier(first.label, second.label, reason=reason))
            continue
        one, other, loaders = models[first.label], models[second.label], data[first.content["data"]]
        assert isinstance(one, LoadedModel) and isinstance(other, LoadedModel) and isinstance(loaders, dict)
        loss = first.content["loss"]
        found += _of_pair(first, second, one, other, loaders, loss, options)
    return found


def _of_pair(
    first: Run,
    second: Run,
    one: LoadedModel,
    other: LoadedModel,
    loaders: Loaders,
    loss: str | None,
    options: BarrierOptions,
) -> list[Barrier]:
    splits = [split for split in loaders if _has_split(first, split) and _has_split(second, split)]
    shared: dict[str, Any] = {
        "num_samples": options.num_samples,
        "seed": options.seed,
        "loss_fn": None if loss is None else import_object("--loss", loss),
    }
    found = []
    for split in splits:
        given: dict[str, Any] = {split: loaders[split], "device": options.device}
        try:
            end = _MeanLoss(**shared).analyze(other.model, **given)[split]
            barrier: Barrier = _LossBarrier(tensors_of(other.model), options.num_points, **shared).analyze(
                one.model, **given
            )[split]
        except Exception as error:  # a page with the other results is worth more than none
            reason = f"the loss failed with {type(error).__name__}: {one_sentence(error)}"
            found.append(Barrier(first.label, second.label, split, reason))
            continue
        assert barrier.before is not None
        reached = barrier.before.losses[-1]
        if abs(reached - end) > _SAME_LOSS * max(abs(reached), abs(end)):
            reason = (
                f"with the weights of {second.label}, the module of {first.label} has the loss {reached:.6g} and that"
                f" of {second.label} {end:.6g}: the modules differ in more than their weights"
            )
            found.append(Barrier(first.label, second.label, split, reason))
            continue
        found.append(Barrier(first.label, second.label, split, "", barrier.before, barrier.after, barrier.match))
    return found or [Barrier(first.label, second.label, reason="no split was analyzed in both")]


def _has_split(run: Run, split: str) -> bool:
    return any(split in splits for splits in run.content["analyses"].values())


def _reason(first: Run, second: Run, models: Mapping[str, LoadedModel | str], data: Mapping[str, Loaders | str]) -> str:
    for run in (first, second):
        model = models[run.label]
        if isinstance(model, str):
            return f"{run.label}: {model}"
    for key in ("data", "loss"):
        if first.content[key] != second.content[key]:
            return f"different {key}: {first.content[key]} and {second.content[key]}"
    found = data[first.content["data"]]
    if isinstance(found, str):
        return found
    one, other = models[first.label], models[second.label]
    assert isinstance(one, LoadedModel) and isinstance(other, LoadedModel)
    misfit = unequal_shapes(tensors_of(one.model), tensors_of(other.model))
    return f"different shapes: {second.label} has {misfit}" if misfit else ""


def _load(run: Run, options: BarrierOptions) -> LoadedModel | str:
    """Load the model of a run, or return the reason why it cannot be loaded."""
    saved = run.content["checkpoint"]
    try:
        loaded = load_model(run.content["model"]["name"], Path(saved["path"]), unpickle=options.unpickle)
    except CommandError as error:
        return one_sentence(error)
    if loaded.checkpoint_digest != saved["sha256"]:
        return "the checkpoint has changed since it was analyzed (another SHA-256 digest)"
    if loaded.weights_digest != run.content["model"]["weights_sha256"]:
        return "the module has changed since it was analyzed (other weights from the same checkpoint)"
    return loaded


def _data(name: str) -> Loaders | str:
    try:
        return load_data(name)
    except CommandError as error:
        return one_sentence(error)


class _MeanLoss(Analysis):
    """Mean loss of a model on the samples of the barrier."""

    name = "mean_loss"

    @override
    def compute(self, inputs: AnalysisInputs) -> float:
        return mean_loss(inputs.model, inputs.loss_fn, inputs.batches, seed=self.seed)

    @override
    def report(self, result: float) -> Report:
        return Report({"loss": result})


class _LossBarrier(Analysis):
    """Loss along the line to another network before and after matching."""

    name = "loss_barrier"

    def __init__(self, other: Mapping[str, Tensor], num_points: int, **options: Any) -> None:
        super().__init__(**options)
        self._other, self._num_points = other, num_points

    @override
    def compute(self, inputs: AnalysisInputs) -> Barrier:
        shared: dict[str, Any] = {"num_points": self._num_points, "seed": self.seed, "progress": inputs.progress}
        before = line_loss(inputs.model, self._other, inputs.loss_fn, inputs.batches, **shared)
        match = match_weights(inputs.model, self._other, inputs.loss_fn, inputs.batches[0], seed=self.seed)
        after = line_loss(inputs.model, match.tensors, inputs.loss_fn, inputs.batches, **shared)
        return Barrier("", "", inputs.split, "", before, after, match)

    @override
    def report(self, result: Barrier) -> Report:
        assert result.before is not None and result.after is not None
        return Report({"before": result.before.barrier, "after": result.after.barrier})

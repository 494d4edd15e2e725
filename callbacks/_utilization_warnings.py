"""Warnings of `ExpertUtilizationCallback` about what it cannot know. Each one is given once in a fit."""

from collections.abc import Iterable

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from moe_heads.analysis.expert_utilization.labels import NoClasses

__all__ = ["UtilizationWarnings"]


class UtilizationWarnings:
    """Warnings of one fit.

    Args:
        name: Name of the callback, the start of each warning.
        has_label_fn: Whether the user passed a label function. Data without labels are then no news.
    """

    def __init__(self, name: str, has_label_fn: bool) -> None:
        self._name, self._has_label_fn = name, has_label_fn
        self._given: set[str] = set()

    def notes(self, notes: Iterable[str]) -> None:
        """Warn of what is not known of the routers."""
        for note in notes:
            self._warn(note, note)

    def validation_data_changed(self) -> None:
        """Warn that validations have different batches."""
        self._warn(
            "order",
            "validation batches differ between epochs, so routing flips cannot be computed. Give the validation loader"
            " shuffle=False and no random transform.",
        )

    def none_ran(self, epoch: int) -> None:
        """Warn that no router ran in an epoch."""
        self._warn(
            "silence",
            f"no router ran in epoch {epoch}, so there are no numbers for it. A model that was compiled and run before"
            " this fit does not call forward hooks. Attach the callback to its first fit, or compile it again after"
            " torch._dynamo.reset().",
        )

    def no_classes(self, reason: NoClasses | None) -> None:
        """Say why there are no quantities of classes, as a warning if the labels are odd."""
        if reason is None or "labels" in self._given:
            return
        text = f"no class map and no mutual information: {reason.text}"
        if reason.is_odd:
            self._warn("labels", text)
        elif not self._has_label_fn:
            rank_zero_info(f"{self._name}: {text}")
        self._given.add("labels")

    def _warn(self, key: str, text: str) -> None:
        if key not in self._given:
            self._given.add(key)
            rank_zero_warn(f"{self._name}: {text}")

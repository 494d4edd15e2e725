"""Checks of the sharpness that only some points of a series make."""

import math

from moe_heads.analysis import SharpnessResult
from moe_heads.callbacks._shared.trainer_access import Split

__all__ = ["IntermittentChecks"]

_MADE_AT = "made at step "


class IntermittentChecks:
    """Comparisons with float64 and with finite differences, made at every n-th point of a split.

    They compare the code of the loss and its derivatives with their definition. Nothing about that changes from step to
    step, while the search for missing eigenvalues and the residuals belong to the weights of a point. A check that
    failed, or could not be made, is repeated at every point.

    Args:
        every: Number of points n.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        # step of the last checks and number of points since then
        self._last: dict[Split, tuple[int, int]] = {}

    def forget(self) -> None:
        """Forget the points of a training."""
        self._last = {}

    def reason(self, split: Split) -> str:
        """Return the reason for which the next point leaves out the checks, "" if it makes them."""
        if split not in self._last:
            return ""
        step, count = self._last[split]
        return f"{_MADE_AT}{step}, and at every {self._every} points" if count < self._every else ""

    def note(self, split: Split, step: int, result: SharpnessResult) -> None:
        """Count a point, or an analysis between points.

        Args:
            split: Its split.
            step: Number of optimizer steps.
            result: Its result.
        """
        if self.are_left_out_of(result):
            last, count = self._last[split]
            self._last[split] = last, count + 1
            return
        self._last.pop(split, None)
        certificate = result.certificate
        if certificate is None or result.partial:
            return
        have_passed = certificate.is_hessian and not math.isnan(certificate.rounding + certificate.derivative_error)
        if have_passed:
            self._last[split] = step, 1

    @staticmethod
    def are_left_out_of(result: SharpnessResult) -> bool:
        """Return whether a result left out the checks because of an earlier point."""
        certificate = result.certificate
        return certificate is not None and any(_MADE_AT in reason for reason in certificate.unchecked.values())

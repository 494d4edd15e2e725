"""Preconditioned sharpness in the sharpness callback: the optimizer, its threshold, and the start vectors."""

from collections.abc import Collection, Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from moe_heads.analysis.sharpness.preconditioned import PreconditionedSharpnessResult, preconditioned_sharpness
from moe_heads.analysis.sharpness.preconditioner import (
    check_preconditioner,
    preconditioned_threshold,
    preconditioner_of,
)
from moe_heads.callbacks._shared.inputs import AnalysisInputs
from moe_heads.callbacks._shared.trainer_access import Split

__all__ = ["PreconditionedAnalysis"]


class PreconditionedAnalysis:
    """Largest eigenvalue in the metric of the optimizer, along one training.

    Args:
        owner: Name of the callback in messages.
        tolerance: Largest relative residual.
        max_steps: Maximum number of Lanczos steps.
        seed: Seed of the random vectors.
    """

    def __init__(self, owner: str, tolerance: float, max_steps: int, seed: int) -> None:
        self._owner, self._tolerance, self._max_steps, self._seed = owner, tolerance, max_steps, seed
        self._threshold: float | None = None
        self._starts: dict[Split, Tensor] = {}

    def begin(self, optimizers: Sequence[Optimizer]) -> None:
        """Forget the previous training, and check the optimizer of this one.

        Raises:
            MisconfigurationException: If there is not one optimizer with a known preconditioner.
        """
        self._threshold, self._starts = None, {}
        self._optimizer(optimizers)

    def before_step(self, optimizers: Sequence[Optimizer]) -> None:
        """Note the threshold of a step: at the end of an epoch, a scheduler has already changed the learning rate."""
        self._threshold = preconditioned_threshold(self._optimizer(optimizers))

    def compute(
        self, inputs: AnalysisInputs, names: Collection[str], *, is_tracking: bool
    ) -> PreconditionedSharpnessResult:
        """Return the largest eigenvalue for some parameters.

        Args:
            inputs: Inputs of the analysis.
            names: Names of the parameters.
            is_tracking: Whether to start from the previous eigenvector.
        """
        diagonals = preconditioner_of(self._optimizer(inputs.context.optimizers), inputs.model)
        device = next(inputs.model.parameters()).device  # the optimizer of a finished fit is on the CPU
        diagonals = {name: diagonal.to(device) for name, diagonal in diagonals.items() if name in names}
        start = self._starts.get(inputs.split) if is_tracking else None
        size = sum(diagonal.numel() for diagonal in diagonals.values())
        found = preconditioned_sharpness(
            inputs.model,
            inputs.loss_fn,
            inputs.batches,
            diagonals,
            tolerance=self._tolerance,
            max_steps=self._max_steps,
            start=start if start is not None and len(start) == size else None,
            threshold=self._threshold if inputs.split == "train" else None,
            seed=self._seed,
            progress=inputs.progress,
            ranks=inputs.ranks,
        )
        self._starts[inputs.split] = found.start
        if not found.converged:
            inputs.progress.warn("the preconditioned eigenvalue did not converge. Raise max_steps.")
        return found

    def _optimizer(self, optimizers: Sequence[Optimizer]) -> Optimizer:
        if len(optimizers) != 1:
            raise MisconfigurationException(
                f"{self._owner}(preconditioned=True): expected a training with one optimizer, got {len(optimizers)}."
                " Pass preconditioned=False, or the optimizer: monitor.start(model, optimizer)."
            )
        try:
            check_preconditioner(optimizers[0])
        except ValueError as error:
            raise MisconfigurationException(f"{self._owner}(preconditioned=True): {error}") from error
        return optimizers[0]

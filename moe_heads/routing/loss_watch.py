"""Detection of balance losses that are missing in the training loss."""

import warnings

from torch import Tensor

from moe_heads.modes import is_transformed

__all__ = ["LossWatch"]

# Passes with a gradient of the router, but none of its balance loss, after which it counts as forgotten. A loss that is
# added in every tenth step only stays far below.
_MANY_PASSES = 300


class LossWatch:
    """Record of whether the balance loss of one router ever gets a gradient in training.

    Attributes:
        num_passes: Number of passes whose mixing weights got a gradient before any balance loss did.
        has_gradient: Whether a backward pass ever reached the balance loss.
        warns: Whether to warn after many passes. False while a callback reports the router by its name.
    """

    def __init__(self) -> None:
        self.num_passes = 0
        self.has_gradient = False
        self.warns = True

    @property
    def is_unused(self) -> bool:
        """True if there were training passes and none of their balance losses got a gradient."""
        return self.num_passes > 0 and not self.has_gradient

    def restart(self) -> None:
        """Forget everything, for a new training."""
        self.num_passes, self.has_gradient = 0, False

    def watch(self, weights: Tensor, router: str) -> None:
        """Count a pass when its weights get a gradient, and warn once if the balance loss seems to be forgotten.

        Args:
            weights: Mixing weights of a training pass, with a graph.
            router: Description of the router for the warning.
        """
        weights.register_hook(lambda gradient: self._count_pass(router))

    def _count_pass(self, router: str) -> None:
        # autograd runs the latest operations first: the gradient of a balance loss arrives before that of the weights
        if self.has_gradient:
            return
        self.num_passes += 1
        if self.warns and self.num_passes >= _MANY_PASSES:
            self.warns = False
            warnings.warn(f"{router}: {self.describe()}", stacklevel=2)

    def describe(self) -> str:
        """Describe the problem and how to solve it, as a sentence without a subject."""
        return (
            f"the balance loss got no gradient in {self.num_passes} training passes, so it has no effect. Add it to the"
            " training loss: `logits, aux_loss, _ = head(x, return_routing=True)`, or aux_loss of"
            " moe_heads.collect_routing(model) for a head inside a model. Or build the router with balance=None."
        )

    def attach(self, loss: Tensor) -> None:
        """Note when a backward pass reaches a balance loss."""
        if loss.requires_grad and not is_transformed():
            loss.register_hook(self._note_gradient)

    def _note_gradient(self, gradient: Tensor) -> None:
        self.has_gradient = True

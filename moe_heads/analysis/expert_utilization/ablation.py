"""Contribution of each expert to the accuracy, measured without the expert on the same samples (ablation).

Shapes: B samples, C classes, E experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.batches import Batch, ForwardFn
from moe_heads.analysis.expert_utilization.labels import IGNORED
from moe_heads.surgery import ablate

__all__ = ["AblationCounts", "ExpertAblation", "ablated_heads", "count_ablation"]


@dataclass(frozen=True, eq=False)
class ExpertAblation:
    """Accuracy with all experts and without each of them, with paired standard errors over samples.

    Attributes:
        accuracy: Fraction of the samples that the whole model classifies correctly.
        without: The same without expert e, whose rows are routed to the other experts, (E,), float64.
        without_stderr: Standard error of ``accuracy - without``, (E,).
    """

    accuracy: float
    without: Tensor
    without_stderr: Tensor

    @property
    def contribution(self) -> Tensor:
        """Accuracy lost without each expert, (E,). Negative if the model is better without it."""
        return self.accuracy - self.without


@dataclass(frozen=True, eq=False)
class AblationCounts:
    """Sums over samples from which an `ExpertAblation` is computed.

    Attributes:
        num_samples: Number of samples with a class.
        correct: Number of samples classified correctly.
        lost: Number of samples that are correct with all experts and wrong without expert e, (E,), int64.
        gained: Number of samples that are wrong with all experts and correct without expert e, (E,), int64.
    """

    num_samples: int
    correct: int
    lost: Tensor
    gained: Tensor

    def __add__(self, other: "AblationCounts") -> "AblationCounts":
        return AblationCounts(
            self.num_samples + other.num_samples,
            self.correct + other.correct,
            self.lost + other.lost,
            self.gained + other.gained,
        )

    def result(self) -> ExpertAblation:
        """Compute the accuracies."""
        mean = (self.lost - self.gained).double() / self.num_samples
        # variance of a difference that is -1, 0 or 1
        variance = ((self.lost + self.gained).double() / self.num_samples - mean.square()).clamp_min(0)
        accuracy = self.correct / self.num_samples
        return ExpertAblation(accuracy, accuracy - mean, (variance / self.num_samples).sqrt())


def ablated_heads(model: nn.Module, names: Mapping[str, int]) -> dict[str, list[nn.Module]]:
    """Return, for each head that supports the removal of an expert, its copies without each expert.

    Args:
        model: The model.
        names: Number of experts by the name of the head, "head" for the model itself.

    Raises:
        ValueError: If no head supports it. The message names a reason.
    """
    smaller: dict[str, list[nn.Module]] = {}
    reason = "a model without a head of moe_heads"
    for name, num_experts in names.items():
        head: Any = head_named(model, name)
        try:
            smaller[name] = [ablate(head, [expert]) for expert in range(num_experts)]
        except ValueError as error:
            reason = f"{name!r}, which does not ({str(error).rstrip('.')})"
    if not smaller:
        raise ValueError(
            f"ablation: expected a head that supports the removal of an expert, got {reason}. Pass ablation=False."
        )
    return smaller


def head_named(model: nn.Module, name: str) -> nn.Module:
    """Return the head with this name in a `RoutingCollection`."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    return modules.get(name, model)


def count_ablation(
    model: nn.Module, forward_fn: ForwardFn, batch: Batch, labels: Tensor, smaller: Mapping[str, list[nn.Module]]
) -> dict[str, AblationCounts]:
    """Count the samples that are classified correctly with all experts, and without each of them.

    If the model returns the output of its head, only the head runs again. Otherwise the whole model does.

    Args:
        model: The model, in evaluation mode.
        forward_fn: Function that runs it and returns logits (B, C), or an object that has them as ``logits``.
        batch: The batch.
        labels: (B,), `IGNORED` for a sample without a class.
        smaller: Heads without one expert, from `ablated_heads`.

    Raises:
        ValueError: If the model returns no logits for the samples.
    """
    found: dict[str, AblationCounts] = {}
    for name, heads in smaller.items():
        head = head_named(model, name)
        calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
        record = head.register_forward_hook(lambda _, a, k, o, calls=calls: calls.append((a, k, o)), with_kwargs=True)
        try:
            output = forward_fn(model, batch)
        finally:
            record.remove()
        correct = _correct(output, labels)
        is_last = len(calls) == 1 and calls[0][2] is output
        lost, gained = [], []
        for without in heads:
            if is_last:
                args, kwargs, _ = calls[0]
                now = _correct(without(*args, **kwargs), labels)
            else:
                now = _correct(_replaced(head, without, lambda: forward_fn(model, batch)), labels)
            lost.append((correct & ~now).sum())
            gained.append((~correct & now).sum())
        found[name] = AblationCounts(
            len(correct), int(correct.sum()), torch.stack(lost).cpu(), torch.stack(gained).cpu()
        )
    return found


def _replaced(head: nn.Module, by: nn.Module, run: Callable[[], Any]) -> Any:
    """Return the result of ``run()`` with another module in place of the head."""
    handle = head.register_forward_hook(lambda _, args, kwargs, output: by(*args, **kwargs), with_kwargs=True)
    try:
        return run()
    finally:
        handle.remove()


def _correct(output: Any, labels: Tensor) -> Tensor:
    """Return the mask of the correctly classified samples, among those with a class."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(labels) or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(
            f"ablation: expected a model that returns logits ({len(labels)}, C) of C ≥ 2 classes, alone or as 'logits',"
            f" got {got}. Return them from the model or from forward_fn, or pass ablation=False."
        )
    labels = labels.to(logits.device)
    return (logits.argmax(-1) == labels)[labels != IGNORED]

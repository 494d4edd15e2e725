"""What each expert contributes to the accuracy: the head without it, on the same samples.

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

__all__ = ["AblationHits", "ExpertAblation", "ablated_heads", "ablation_hits"]


@dataclass(frozen=True, eq=False)
class ExpertAblation:
    """Accuracy with all experts and without each of them; standard errors over samples, paired.

    Attributes:
        accuracy: Share of the samples that the whole model classifies rightly.
        without: The same without expert e, whose rows go to the others, (E,), float64.
        without_stderr: Standard error of ``accuracy - without``, (E,).
    """

    accuracy: float
    without: Tensor
    without_stderr: Tensor

    @property
    def contribution(self) -> Tensor:
        """Accuracy that is lost without each expert, (E,); negative where the model is better without it."""
        return self.accuracy - self.without


@dataclass(frozen=True, eq=False)
class AblationHits:
    """Sums over samples from which an `ExpertAblation` follows.

    Attributes:
        num_samples: Samples with a class.
        right: Samples classified rightly.
        lost: Samples that are right with all experts and wrong without expert e, (E,), int64.
        won: The other way round, (E,), int64.
    """

    num_samples: int
    right: int
    lost: Tensor
    won: Tensor

    def __add__(self, other: "AblationHits") -> "AblationHits":
        return AblationHits(
            self.num_samples + other.num_samples, self.right + other.right, self.lost + other.lost, self.won + other.won
        )

    def result(self) -> ExpertAblation:
        """The accuracies."""
        mean = (self.lost - self.won).double() / self.num_samples
        # of a difference that is -1, 0 or 1
        variance = ((self.lost + self.won).double() / self.num_samples - mean.square()).clamp_min(0)
        accuracy = self.right / self.num_samples
        return ExpertAblation(accuracy, accuracy - mean, (variance / self.num_samples).sqrt())


def ablated_heads(model: nn.Module, names: Mapping[str, int]) -> dict[str, list[nn.Module]]:
    """For each head that can lose an expert, its copies without one.

    Args:
        model: The model.
        names: Number of experts by the name of the head, "head" for the model itself.

    Raises:
        ValueError: If no head can; says why one of them cannot.
    """
    smaller: dict[str, list[nn.Module]] = {}
    reason = "the model has no head of moe_heads"
    for name, num_experts in names.items():
        head: Any = head_named(model, name)
        try:
            smaller[name] = [ablate(head, [expert]) for expert in range(num_experts)]
        except ValueError as error:
            reason = f"{name!r} cannot; {error}"
    if not smaller:
        raise ValueError(f"ablation: expected a head that can lose an expert; {reason}")
    return smaller


def head_named(model: nn.Module, name: str) -> nn.Module:
    """The head that goes by this name in a `RoutingCollection`."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    return modules.get(name, model)


def ablation_hits(
    model: nn.Module, forward_fn: ForwardFn, batch: Batch, labels: Tensor, smaller: Mapping[str, list[nn.Module]]
) -> dict[str, AblationHits]:
    """Who is classified rightly with all experts, and without each of them.

    Where the model returns what its head returned, only the head runs again; else the whole model does.

    Args:
        model: The model, in evaluation mode.
        forward_fn: Runs it; returns logits (B, C), or something that has them as ``logits``.
        batch: The batch.
        labels: (B,); `IGNORED` for a sample without a class.
        smaller: The heads without one expert; see `ablated_heads`.

    Raises:
        ValueError: If the model returns no logits for the samples.
    """
    found: dict[str, AblationHits] = {}
    for name, heads in smaller.items():
        head = head_named(model, name)
        calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
        record = head.register_forward_hook(lambda _, a, k, o, calls=calls: calls.append((a, k, o)), with_kwargs=True)
        try:
            output = forward_fn(model, batch)
        finally:
            record.remove()
        right = _right(output, labels)
        is_last = len(calls) == 1 and calls[0][2] is output
        lost, won = [], []
        for without in heads:
            if is_last:
                args, kwargs, _ = calls[0]
                now = _right(without(*args, **kwargs), labels)
            else:
                now = _right(_replaced(head, without, lambda: forward_fn(model, batch)), labels)
            lost.append((right & ~now).sum())
            won.append((~right & now).sum())
        found[name] = AblationHits(len(right), int(right.sum()), torch.stack(lost).cpu(), torch.stack(won).cpu())
    return found


def _replaced(head: nn.Module, by: nn.Module, run: Callable[[], Any]) -> Any:
    """What ``run()`` returns with another module in the place of the head."""
    handle = head.register_forward_hook(lambda _, args, kwargs, output: by(*args, **kwargs), with_kwargs=True)
    try:
        return run()
    finally:
        handle.remove()


def _right(output: Any, labels: Tensor) -> Tensor:
    """Who is classified rightly, among the samples with a class."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(labels) or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(
            f"ablation: expected a model that returns logits ({len(labels)}, C) of C ≥ 2 classes, alone or as 'logits';"
            f" got {got}"
        )
    labels = labels.to(logits.device)
    return (logits.argmax(-1) == labels)[labels != IGNORED]

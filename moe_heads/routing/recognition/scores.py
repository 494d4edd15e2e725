"""Rules for the scores that a router of another package compares, from its logits.

Shapes: N rows, E experts, G groups of experts, K choices per row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_heads.routing.recognition.observed import Pass
from moe_heads.routing.routing import Routing
from moe_heads.routing.third_party import fields_of_probs

__all__ = ["PROBABILITIES", "SIGMOID", "SOFTMAX", "ScoreRule", "best_groups_only"]

Function = Callable[[nn.Module, Tensor], Tensor]


def _softmax(module: nn.Module, logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _sigmoid(module: nn.Module, logits: Tensor) -> Tensor:
    return logits.sigmoid()


@dataclass(frozen=True)
class ScoreRule:
    """Rule by which a router with the output (logits, weights, indices) decides.

    Attributes:
        function: From the module and its logits (N, E) to non-negative scores of the experts.
        bias: What is added to the scores for the choice only: the path of an attribute of the router, or the position
            of an argument of its forward pass. None if nothing is added.
        biased: Whether the bias is added to the scores or to the logits.
        groups: For routers that choose the ``topk_group`` best of their ``num_group`` groups first, the value of a
            group: its largest score ("max") or the sum of its two largest ones ("top2").
    """

    function: Function = _softmax
    bias: str | int | None = None
    biased: Literal["scores", "logits"] = "scores"
    groups: Literal["max", "top2"] | None = None

    def routing(self, seen: Pass, logits: Tensor, choices: Tensor, weights: Tensor) -> Routing:
        """Build the routing of one pass. The margin is nan unless the choices are those of the highest scores.

        Args:
            seen: The pass.
            logits: Output of the gate, (N, E) or (B, T, E).
            choices: The choices, of the same shape except for the last dimension, K.
            weights: Their mixing weights.
        """
        probs = self.function(seen.module, logits)
        scores = self._compared(seen, logits, probs)
        return Routing(**fields_of_probs(probs.float(), choices, weights.float(), None, scores, is_trusted=True))

    def _compared(self, seen: Pass, logits: Tensor, probs: Tensor) -> Tensor | None:
        """Return the scores that decide, (N, E), or None where these are the probabilities."""
        limited = self.groups is not None and _has_groups(seen.module)
        if self.bias is None and not limited:
            return None
        scores = probs if self.biased == "scores" else logits
        bias = self._bias_of(seen)
        if bias is not None:
            scores = scores + bias.detach().reshape(-1)
        if not limited or self.groups is None:
            return scores
        groups, best = (int(getattr(seen.module, name)) for name in ("num_group", "topk_group"))
        return best_groups_only(scores, groups, best, self.groups)

    def _bias_of(self, seen: Pass) -> Tensor | None:
        value: Any = seen.module
        if isinstance(self.bias, int):
            value = seen.argument(self.bias, "e_score_correction_bias", "expert_bias")
        elif self.bias is not None:
            for name in self.bias.split("."):
                value = getattr(value, name, None)
        return value if isinstance(value, Tensor) else None


def _has_groups(module: nn.Module) -> bool:
    num_group = getattr(module, "num_group", None)
    is_limited = getattr(module, "topk_method", "group_limited_greedy") != "greedy"
    return isinstance(num_group, int) and num_group > 1 and is_limited


def best_groups_only(scores: Tensor, num_groups: int, num_best: int, value: Literal["max", "top2"]) -> Tensor:
    """Return the scores with minus infinity outside of the best groups of each row."""
    grouped = scores.unflatten(-1, (num_groups, -1))
    num_summed = 1 if value == "max" else min(2, grouped.shape[-1])
    of_groups = grouped.topk(num_summed, dim=-1).values.sum(-1)
    best = of_groups.topk(num_best, dim=-1).indices
    is_best = torch.zeros_like(of_groups, dtype=torch.bool).scatter(-1, best, True)
    return torch.where(is_best.unsqueeze(-1), grouped, -torch.inf).flatten(-2)


SOFTMAX = ScoreRule()
"""The largest logits are chosen. Whether the softmax runs before or after the choice does not matter here."""

SIGMOID = ScoreRule(_sigmoid)
"""The largest sigmoids are chosen."""

PROBABILITIES = ScoreRule(lambda module, probs: probs)
"""The router returns probabilities in place of logits."""

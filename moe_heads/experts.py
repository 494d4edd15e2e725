"""Experts with stacked parameters.

Shapes: N rows, D features, E experts, H expert width, C outputs (the classes of a head).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.checks import check_at_least_one, check_option, check_shares

__all__ = ["ACTIVATIONS", "Activation", "Experts", "StackedLinear"]

Activation = Literal["relu", "gelu", "silu"]

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "gelu": F.gelu,
    "silu": F.silu,
}
"""Activations by name. Each may overwrite its argument."""

# Names of the parameters in state dicts of formats 1 and 2, in which the biases were (E, H) and (E, C).
_OLD_NAMES = {"weight1": "fc1.weight", "bias1": "fc1.bias", "weight2": "fc2.weight", "bias2": "fc2.bias"}


class StackedLinear(nn.Module):
    """Parameters of E linear layers, stacked. `moe_heads.dispatch` computes with them.

    The bias is flat, because recipes for optimizers distinguish weights from biases by the number of dimensions (or by
    the name): no weight decay for a one-dimensional parameter, and no Muon. Weights and biases are initialized like
    those of `torch.nn.Linear`, from U(-1/√I, 1/√I).

    Args:
        num_experts: E.
        in_features: I.
        out_features: O.

    Attributes:
        weight: (E, O, I).
        bias: (E·O,), expert by expert.
    """

    num_filter_dims = 2
    """Number of leading dimensions that index filters, for filter normalization: expert and unit."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts * out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sample every parameter from U(-1/√I, 1/√I)."""
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features))

    @property
    def bias_by_expert(self) -> Tensor:
        """Bias as (E, O)."""
        return self.bias.view(self.num_experts, self.out_features)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"


class Experts(nn.Module):
    """E two-layer perceptrons D → H → activation → dropout → C with their parameters stacked.

    Stacked parameters get a dense gradient, which is zero for an expert without rows. So DistributedDataParallel finds
    a gradient for every parameter in every step. `moe_heads.dispatch` decides which experts run on which rows.

    Args:
        num_experts: E.
        in_features: D.
        width: H.
        out_features: C.
        dropout: Probability after the activation.
        activation: "relu", "gelu" or "silu".
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        width: int,
        out_features: int,
        dropout: float = 0.0,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        check_at_least_one(num_experts=num_experts, in_features=in_features)
        check_at_least_one(expert_width=width, out_features=out_features)
        check_shares(dropout=dropout)
        check_option("activation", activation, get_args(Activation))
        self.num_experts = num_experts
        self.in_features, self.width, self.out_features = in_features, width, out_features
        self.dropout, self.activation = dropout, activation
        self.fc1 = StackedLinear(num_experts, in_features, width)
        self.fc2 = StackedLinear(num_experts, width, out_features)

    def stacks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the weights and biases: (E, H, D), (E, H), (E, C, H), (E, C)."""
        return self.fc1.weight, self.fc1.bias_by_expert, self.fc2.weight, self.fc2.bias_by_expert

    @property
    def parameters_per_expert(self) -> int:
        """Number of parameters of one expert."""
        return sum(parameter.numel() for parameter in self.parameters()) // self.num_experts

    @property
    def flops_per_row(self) -> int:
        """Floating point operations of one expert on one row, two per multiply-add of its matrices."""
        return 2 * self.width * (self.in_features + self.out_features)

    def activate(self, hidden: Tensor) -> Tensor:
        """Apply the activation, and dropout in training, between the layers. ``hidden`` may be overwritten."""
        hidden = ACTIVATIONS[self.activation](hidden)
        return F.dropout(hidden, self.dropout) if self.training and self.dropout else hidden

    def each(self, slots: Tensor) -> Tensor:
        """Run every expert on its own slots.

        Args:
            slots: (B, E, S, D).

        Returns:
            (B, E, S, C).
        """
        weight1, bias1, weight2, bias2 = self.stacks()
        hidden = self.activate(torch.einsum("besd,ehd->besh", slots, weight1) + bias1.unsqueeze(-2))
        return torch.einsum("besh,ech->besc", hidden, weight2) + bias2.unsqueeze(-2)

    @torch.no_grad()
    def copy_from(self, first: nn.Linear, second: nn.Linear) -> None:
        """Copy two linear layers into every expert. A layer without a bias gives zeros."""
        for target, source in ((self.fc1, first), (self.fc2, second)):
            # by name: a pruned or parametrized layer has other parameters besides its weight
            target.weight.copy_(source.weight.expand_as(target.weight))
            bias = source.bias
            target.bias_by_expert.copy_(torch.zeros(()) if bias is None else bias.expand_as(target.bias_by_expert))

    def keep(self, experts: Sequence[int]) -> Self:
        """Return a copy with only these experts, for `moe_heads.ablate`."""
        # the meta device leaves the random number generator untouched
        with torch.device("meta"):
            kept = type(self)(
                len(experts), self.in_features, self.width, self.out_features, self.dropout, self.activation
            )
        for layer, copied in ((self.fc1, kept.fc1), (self.fc2, kept.fc2)):
            for name, parameter in layer.named_parameters():
                rows = parameter.detach().unflatten(0, (self.num_experts, -1))[list(experts)].flatten(0, 1)
                setattr(copied, name, nn.Parameter(rows.view(getattr(copied, name).shape), parameter.requires_grad))
        return kept.train(self.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for old, new in _OLD_NAMES.items():
            if prefix + old in state_dict:
                value = state_dict.pop(prefix + old)
                state_dict[prefix + new] = value.flatten() if new.endswith("bias") else value
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return the settings that the lines of the layers do not show."""
        return f"dropout={self.dropout}, activation={self.activation!r}"

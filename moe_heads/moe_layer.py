"""Sparse mixture-of-experts layer: tokens to tokens, in place of a perceptron inside a network."""

from collections.abc import Mapping
from typing import Literal, NamedTuple, overload

from torch import Tensor

from moe_heads.checks import check_flags
from moe_heads.dispatch import Dispatch
from moe_heads.experts import Activation
from moe_heads.routing import Router, Routing
from moe_heads.sparse_mixture import DEFAULT, Default, GateOptions, SparseMixture

__all__ = ["LayerOutput", "MoELayer"]


class LayerOutput(NamedTuple):
    """Output of ``layer(x, return_routing=True)``.

    Attributes:
        output: (..., D_out).
        aux_loss: Balance loss to add to the task loss, scalar.
        routing: Decisions of the router.
    """

    output: Tensor
    aux_loss: Tensor
    routing: Routing


class MoELayer(SparseMixture):
    r"""Mixture of few experts per token, :math:`y = \sum_{s} f_s(x) + \sum_{e \in \mathrm{chosen}} g_e(x) f_e(x)`.

    The layer maps each token (or row, or pixel) to an output of D_out features, in place of a two-layer perceptron.
    Router, dispatch and statistics are those of `SparseMoE`, whose arguments it shares. `moe_heads.replace_mlp` puts it
    into a model. Add its balance loss to the training loss: `moe_heads.collect_routing` sums those of all layers.

    Args:
        in_features: D.
        out_features: D_out. None means D.
        num_experts: E.
        expert_width: Hidden units of one expert.
        k: Number of experts chosen per token.
        noisy: Whether to add noise to the logits in training. By default only if ``balance`` has the load loss.
        temperature: Divisor of the router logits.
        dropout: Dropout probability after the activation of an expert.
        balance: Coefficients of the balance losses, by default ``{"switch": 0.1}``. None means no loss.
        dispatch: Execution path of the experts.
        router: A router instead of the default gate.
        num_shared_experts: S, the number of experts that run on every token.
        normalize: Whether the gate reads normalized tokens. By default it does for at least 8 features.
        activation: "relu", "gelu" or "silu". The default is that of transformers.

    Raises:
        ValueError: As `SparseMoE` does, or if the activation is unknown.

    Example:
        >>> import torch
        >>> from moe_heads import MoELayer
        >>> layer = MoELayer(32, num_experts=4)
        >>> layer(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        num_experts: int = 8,
        expert_width: int = 64,
        k: int = 2,
        noisy: bool | None = None,
        temperature: float = 1.0,
        dropout: float = 0.0,
        balance: Mapping[str, float] | Default | None = DEFAULT,
        dispatch: Dispatch = "auto",
        router: Router | None = None,
        num_shared_experts: int = 2,
        normalize: bool | None = None,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__(in_features)
        self.out_features = in_features if out_features is None else out_features
        self._build(
            out_features=self.out_features,
            num_experts=num_experts,
            expert_width=expert_width,
            num_shared_experts=num_shared_experts,
            dropout=dropout,
            activation=activation,
            dispatch=dispatch,
            router=router,
            gate=GateOptions(k, noisy, temperature, balance, normalize),
        )

    @overload
    def forward(self, x: Tensor, return_routing: Literal[False] = ..., *, mask: Tensor | None = ...) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, return_routing: Literal[True], *, mask: Tensor | None = ...) -> LayerOutput: ...
    def forward(self, x: Tensor, return_routing: bool = False, *, mask: Tensor | None = None) -> Tensor | LayerOutput:
        """Compute the output of each token.

        Args:
            x: Tokens (B, T, D), rows (B, D), or pixels (B, H, W, D).
            return_routing: Whether to return the balance loss and the routing as well.
            mask: True for real tokens, bool, of the shape of x without its last dimension. The output of the others is
                zero, and they count in no balance loss and no statistic.

        Returns:
            Outputs of the shape of x with D_out features, or a `LayerOutput` with ``return_routing``.

        Raises:
            ValueError: If x has a different size or an integer dtype, the mask has a different shape or dtype, or the
                router does not take a mask.
        """
        check_flags(return_routing=return_routing)
        x = self.prepared(x, mask, f"(B, ..., {self.in_features})")
        output, routing = self.route_and_mix(x, mask)
        if mask is not None:
            output = output.masked_fill(~mask.unsqueeze(-1), 0)
        return LayerOutput(output, routing.aux_loss, routing) if return_routing else output

    def extra_repr(self) -> str:
        """Return the sizes of the layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"

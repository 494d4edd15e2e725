"""Sparse mixture-of-experts head: a router chooses few experts per row."""

from collections.abc import Mapping

from torch import Tensor

from moe_heads.dispatch import Dispatch
from moe_heads.head import Head
from moe_heads.routed_module import masked_mean
from moe_heads.routing import Router, Routing
from moe_heads.sparse_mixture import DEFAULT, Default, GateOptions, SparseMixture

__all__ = ["SparseMoE"]


class SparseMoE(SparseMixture, Head):
    r"""Mixture of few experts per row, :math:`y = \sum_{s} f_s(x) + \sum_{e \in \mathrm{chosen}} g_e(x) f_e(x)`.

    The gate g is that of `moe_heads.routers.NoisyTopKRouter` or of another router. The shared experts s run on every
    row (DeepSeekMoE, arXiv 2401.06066). Tokens (B, T, D) are routed separately, and their logits are averaged over T.
    The loss is piecewise smooth. Its derivatives hold the choice of the experts fixed.

    With the defaults, every expert stayed in use in 80 runs of a benchmark with 8 experts (docs/results.md, Collapse).
    The gate without noise reads normalized rows, the Switch loss balances it, and two shared experts learn from every
    row. The head of the study (arXiv 2601.15021) is ``SparseMoE(..., **moe_heads.NOISY_TOP_K)``.

    Args:
        in_features: D.
        num_classes: C.
        num_experts: E.
        expert_width: Hidden units of one expert.
        k: Number of experts chosen per row. With 1 the weight is the full-softmax probability, which keeps the
            gradient of the router.
        noisy: Whether to add noise to the logits in training (never in evaluation). By default only if ``balance`` has
            the load loss, which needs it.
        temperature: Divisor of the router logits. Above 1 the weights are flatter.
        dropout: Dropout probability after the ReLU of an expert.
        balance: Coefficients of the balance losses "importance", "load", "switch", "z" and "kl", by default
            ``{"switch": 0.1}``. None means no loss. See `moe_heads.balance`.
        dispatch: Execution path of the experts. The result is the same for all. "ragged" runs each chosen expert on
            its rows (eager mode). "all" runs every expert on every row, and supports every mode
            (torch.export, vmap, CUDA graphs). "gathered" gathers the weights of the chosen experts for each row, for
            few rows under torch.compile. "grouped" is one grouped matrix product for many rows. "auto" takes on a CPU
            the path that a cost model predicts to be the fastest for the number of rows and the mode. On other devices
            it is "all".
        router: One of `moe_heads.routers`, or a custom `Router`, instead of the default gate. It has its own ``k``,
            ``noisy``, ``temperature``, ``balance`` and ``normalize``.
        num_shared_experts: S, the number of shared experts, of the same width as the others.
        normalize: Whether the gate reads normalized rows, so that the size of the features has no effect on the choice;
            see `moe_heads.routers.LinearRouter`. By default it does for at least 8 features.

    Raises:
        ValueError: If k > num_experts, a size is below 1, the temperature is not positive, the dropout is outside
            [0, 1), a balance term or dispatch is unknown, the load loss is used without noise, or the router does not
            match. In a call, if the path named by ``dispatch`` does not support the dtype, device, shape or mode.

    Example:
        >>> import torch
        >>> from moe_heads import SparseMoE
        >>> head = SparseMoE(512, 10)
        >>> output = head(torch.randn(4, 512), return_routing=True)
        >>> output.logits.shape, output.routing.indices.shape
        (torch.Size([4, 10]), torch.Size([4, 2]))
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_experts: int = 8,
        expert_width: int = 64,
        k: int = 2,
        noisy: bool | None = None,
        temperature: float = 1.0,
        dropout: float = 0.1,
        balance: Mapping[str, float] | Default | None = DEFAULT,
        dispatch: Dispatch = "auto",
        router: Router | None = None,
        num_shared_experts: int = 2,
        normalize: bool | None = None,
    ) -> None:
        super().__init__(in_features, num_classes)
        self._build(
            out_features=num_classes,
            num_experts=num_experts,
            expert_width=expert_width,
            num_shared_experts=num_shared_experts,
            dropout=dropout,
            activation="relu",
            dispatch=dispatch,
            router=router,
            gate=GateOptions(k, noisy, temperature, balance, normalize),
        )

    def classify(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Routing | None]:
        """Compute the logits (B, C) and the routing of the rows or tokens."""
        logits, routing = self.route_and_mix(x, mask)
        return (logits if x.dim() == 2 else masked_mean(logits, mask)), routing

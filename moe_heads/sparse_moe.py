"""Sparse mixture-of-experts head: a router chooses few experts per row."""

import inspect
from collections.abc import Callable, Mapping
from typing import get_args

import torch
from torch import Tensor

from moe_heads.checks import check_at_least_one, check_option
from moe_heads.dispatch import Dispatch, keep_outside_the_graph, mix, stages, sum_all
from moe_heads.experts import Experts
from moe_heads.flops import Flops
from moe_heads.head import Head
from moe_heads.routers import NoisyTopKRouter
from moe_heads.routing import Router, Routing

__all__ = ["SparseMoE"]


class SparseMoE(Head):
    r"""Mixture of few experts per row, :math:`y = \sum_{s} f_s(x) + \sum_{e \in \mathrm{chosen}} g_e(x) f_e(x)`.

    The gate g is that of `moe_heads.routers.NoisyTopKRouter` or of another router. The shared experts s run on every
    row (DeepSeekMoE, arXiv 2401.06066). There are none by default. Tokens (B, T, D) are routed separately, and their
    logits are averaged over T. The loss is piecewise smooth. Its derivatives hold the choice of the experts fixed.

    The defaults are those of the study (arXiv 2601.15021): 276,064 parameters for 512 features and 10 classes, 71,068
    of them active in the evaluation of one row.

    Args:
        in_features: D.
        num_classes: C.
        num_experts: E.
        expert_width: Hidden units of one expert.
        k: Number of experts chosen per row. With 1 the weight is the full-softmax probability, which keeps the
            gradient of the router.
        noisy: Whether to add noise to the logits in training (never in evaluation). The noise explores, and the load
            loss needs it.
        temperature: Divisor of the router logits. Above 1 the weights are flatter.
        dropout: Dropout probability after the ReLU of an expert.
        balance: Coefficients of the balance losses "importance", "load", "switch", "z" and "kl". The first two are 0.2
            as in the study. See `moe_heads.balance`.
        dispatch: Execution path of the experts. The result is the same for all. "ragged" runs each chosen expert on
            its rows (eager mode). "all" runs every expert on every row, masked by the weights, and supports every mode
            (torch.export, vmap, CUDA graphs). "gathered" gathers the weights of the chosen experts for each row, for
            few rows under torch.compile. "grouped" is one grouped matrix product, for many rows under torch.compile.
            "auto" takes on a CPU the path that a cost model, fitted on one machine in fp32, predicts to be the fastest
            for the number of rows and the mode. On other devices it is "all".
        router: One of `moe_heads.routers`, or a custom `Router`, instead of the noisy top-k gate. It has its own ``k``,
            ``noisy``, ``temperature``, ``balance`` and ``normalize``.
        num_shared_experts: S, the number of shared experts, of the same width as the others.
        normalize: Whether the gate reads normalized rows, so that the size of the features has no effect on the choice;
            see `moe_heads.routers.LinearRouter`.

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
        noisy: bool = True,
        temperature: float = 1.0,
        dropout: float = 0.1,
        balance: Mapping[str, float] | None = {"importance": 0.2, "load": 0.2},
        dispatch: Dispatch = "auto",
        router: Router | None = None,
        num_shared_experts: int = 0,
        normalize: bool = False,
    ) -> None:
        super().__init__(in_features, num_classes)
        check_at_least_one(num_experts=num_experts)
        check_option("dispatch", dispatch, get_args(Dispatch))
        if num_shared_experts != 0:
            check_at_least_one(num_shared_experts=num_shared_experts)
        if router is None:
            router = NoisyTopKRouter(in_features, num_experts, k, noisy, temperature, balance, normalize)
        else:
            _check_router(router, {"in_features": in_features, "num_experts": num_experts})
            own = {"k": k, "noisy": noisy, "temperature": temperature, "balance": balance, "normalize": normalize}
            _check_absent(own)
        self.num_experts, self.expert_width = num_experts, expert_width
        self.dispatch: Dispatch = dispatch
        keep_outside_the_graph(dispatch)
        self.router = router
        self.experts = Experts(num_experts, in_features, expert_width, num_classes, dropout)
        self.shared: Experts | None = None
        if num_shared_experts:
            self.shared = Experts(num_shared_experts, in_features, expert_width, num_classes, dropout)

    @property
    def k(self) -> float:
        """Number of experts chosen per row. Under expert choice, their mean number."""
        return self.num_experts if self.router.k is None else self.router.k

    def classify(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        """Compute the logits (B, C) and the routing of the rows or tokens."""
        if x.dim() == 2:
            return self._mix(x, 1)
        logits, routing = self._mix(x.flatten(0, 1), x.shape[1])
        return logits.unflatten(0, x.shape[:2]).mean(1), routing

    def _mix(self, rows: Tensor, rows_per_sample: int) -> tuple[Tensor, Routing]:
        routing = self.router(rows, rows_per_sample)
        logits = mix(self.experts, rows, routing, self.dispatch)
        if routing.rows is not None:
            # no expert takes a row with non-finite logits: zero logits would hide the error
            logits = logits.masked_fill(~routing.valid.unsqueeze(-1), torch.nan)
        if self.shared is not None:
            logits = logits + sum_all(self.shared, rows)
        return logits, routing

    def count_flops(self, batch: int, tokens: int) -> Flops:
        """Count the gate, the shared experts, and all or the chosen ones of the other experts, without the noise."""
        rows = batch * tokens
        gate = 2 * sum(parameter.numel() for parameter in self.router.active_parameters() if parameter.dim() > 1)
        always = gate + self._num_shared * self.experts.flops_per_row
        return Flops(
            rows * (always + self.num_experts * self.experts.flops_per_row),
            round(rows * always + self.router.num_choices(batch, tokens) * self.experts.flops_per_row),
        )

    def stages(self, x: Tensor) -> Mapping[str, Callable[[], object]]:
        """Return the dispatch and the combination of the path that x takes. See `Head.stages`."""
        rows = x.flatten(0, -2)
        routing = self.router(rows, x.shape[1] if x.dim() == 3 else 1)
        return stages(self.experts, rows, routing, self.dispatch)

    def extra_repr(self) -> str:
        """Return the sizes and the dispatch path."""
        return f"{super().extra_repr()}, dispatch={self.dispatch!r}"

    @property
    def num_active_parameters(self) -> int:
        """Number of parameters of the gate, of k experts and of the shared ones, without the noise of training."""
        gate = sum(parameter.numel() for parameter in self.router.active_parameters())
        return gate + round((self.k + self._num_shared) * self.experts.parameters_per_expert)

    @property
    def _num_shared(self) -> int:
        return 0 if self.shared is None else self.shared.num_experts


def _check_router(router: Router, sizes: Mapping[str, int]) -> None:
    if not isinstance(router, Router):
        raise ValueError(f"router: expected a moe_heads.Router, got {router!r}.")
    for name, size in sizes.items():
        # a custom router need not have the number of features
        known = getattr(router, name, size if name == "in_features" else None)
        if known != size:
            raise ValueError(
                f"router: expected one for {name} = {size}, got one for {known}. Build the router and the head with the"
                " same sizes."
            )


def _check_absent(options: Mapping[str, object]) -> None:
    defaults = inspect.signature(SparseMoE.__init__).parameters
    for name, value in options.items():
        if value != defaults[name].default:
            raise ValueError(
                f"{name}: expected no value, since router sets it, got {value!r}. Pass {name} to the router instead."
            )

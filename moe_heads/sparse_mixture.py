"""Sparse mixture of experts, common to the head `SparseMoE` and the layer `MoELayer`."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from moe_heads.checks import check_at_least_one, check_option
from moe_heads.dispatch import Dispatch, keep_outside_the_graph, mix, stages, sum_all
from moe_heads.experts import Activation, Experts
from moe_heads.flops import Flops
from moe_heads.routed_module import RoutedModule
from moe_heads.routers import NoisyTopKRouter
from moe_heads.routing import Router, Routing

__all__ = ["DEFAULT", "NOISY_TOP_K", "Default", "GateOptions", "SparseMixture"]

NOISY_TOP_K: dict[str, Any] = {
    "noisy": True,
    "normalize": False,
    "num_shared_experts": 0,
    "balance": {"importance": 0.2, "load": 0.2},
}
"""Options of `SparseMoE` for the head of the study (arXiv 2601.15021): the noisy top-k gate of Shazeer et al. (arXiv
1701.06538) with importance and load loss, and no shared expert. ``SparseMoE(512, 10, **NOISY_TOP_K)`` has 276,064
parameters, 71,068 of them active. On the digits it loses accuracy, and with k = 1 its experts collapse
(docs/results.md, Collapse)."""

Default = Literal["default"]
DEFAULT: Default = "default"

_BALANCE = {"switch": 0.1}

# Modules that exist with some options only.
_OPTIONAL = ("shared", "router.noise")

# Without their mean and size, few features hold too little information to choose among eight experts.
_FEWEST_NORMALIZED = 8


class GateOptions(NamedTuple):
    """Options of the default router of a `SparseMixture`, as its caller passed them, with the caller's defaults."""

    k: int = 2
    noisy: bool | None = None
    temperature: float = 1.0
    balance: Mapping[str, float] | Default | None = DEFAULT
    normalize: bool | None = None

    def router(self, in_features: int, num_experts: int) -> Router:
        """Build the default router."""
        balance: Any = _BALANCE if self.balance == DEFAULT else self.balance
        noisy = self.noisy
        if noisy is None:
            noisy = isinstance(balance, Mapping) and bool(balance.get("load"))
        normalize = in_features >= _FEWEST_NORMALIZED if self.normalize is None else self.normalize
        return NoisyTopKRouter(in_features, num_experts, self.k, noisy, self.temperature, balance, normalize)

    def check_absent(self) -> None:
        """Raise a ValueError for an option that was passed next to a router, which has its own."""
        for name, value, default in zip(self._fields, self, GateOptions(), strict=True):
            if value != default:
                raise ValueError(
                    f"{name}: expected no value, since router sets it, got {value!r}. Pass {name} to the router"
                    " instead."
                )


class SparseMixture(RoutedModule):
    """Base of `SparseMoE` and `MoELayer`: router, chosen experts and shared experts."""

    router: Router
    experts: Experts
    shared: Experts | None

    def _build(
        self,
        *,
        out_features: int,
        num_experts: int,
        expert_width: int,
        num_shared_experts: int,
        dropout: float,
        activation: Activation,
        dispatch: Dispatch,
        router: Router | None,
        gate: GateOptions,
    ) -> None:
        """Build the submodules, with the default router if there is no other one."""
        check_at_least_one(num_experts=num_experts)
        check_option("dispatch", dispatch, get_args(Dispatch))
        if num_shared_experts != 0:
            check_at_least_one(num_shared_experts=num_shared_experts)
        if router is None:
            router = gate.router(self.in_features, num_experts)
        else:
            _check_router(router, {"in_features": self.in_features, "num_experts": num_experts})
            gate.check_absent()
        self.num_experts, self.expert_width = num_experts, expert_width
        self.dispatch: Dispatch = dispatch
        keep_outside_the_graph(dispatch)
        self.router = router
        sizes = (self.in_features, expert_width, out_features, dropout, activation)
        self.experts = Experts(num_experts, *sizes)
        self.shared = Experts(num_shared_experts, *sizes) if num_shared_experts else None

    @property
    def k(self) -> float:
        """Number of experts chosen per row. Under expert choice, their mean number."""
        return self.num_experts if self.router.k is None else self.router.k

    @property
    def num_shared_experts(self) -> int:
        """Number of experts that run on every row, S."""
        return 0 if self.shared is None else self.shared.num_experts

    def route_and_mix(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Routing]:
        """Route each row of x, (..., D), and sum the outputs of its experts, (..., C). Those of padding are undefined.

        Args:
            x: Rows of a sample in all dimensions between the first and the last.
            mask: Real rows, or None.
        """
        rows = x.flatten(0, -2)
        flat_mask = None if mask is None else mask.flatten()
        routing = self.router.route(rows, math.prod(x.shape[1:-1]), flat_mask)
        outputs = mix(self.experts, rows, routing, self.dispatch)
        if routing.rows is not None:
            # no expert takes a row with non-finite logits: outputs of zero would hide the error
            outputs = outputs.masked_fill(~routing.valid.unsqueeze(-1), torch.nan)
        if self.shared is not None:
            outputs = outputs + sum_all(self.shared, rows)
        return (outputs if x.dim() == 2 else outputs.unflatten(0, x.shape[:-1])), routing

    def count_flops(self, batch: int, tokens: int) -> Flops:
        """Count the gate, the shared experts, and all or the chosen ones of the other experts, without the noise."""
        rows = batch * tokens
        gate = 2 * sum(parameter.numel() for parameter in self.router.active_parameters() if parameter.dim() > 1)
        always = gate + self.num_shared_experts * self.experts.flops_per_row
        return Flops(
            rows * (always + self.num_experts * self.experts.flops_per_row),
            round(rows * always + self.router.num_choices(batch, tokens) * self.experts.flops_per_row),
        )

    def stages(self, x: Tensor) -> Mapping[str, Callable[[], object]]:
        """Return the dispatch and the combination of the path that x takes. See `RoutedModule.stages`."""
        rows = x.flatten(0, -2)
        routing = self.router.route(rows, math.prod(x.shape[1:-1]), None)
        return stages(self.experts, rows, routing, self.dispatch)

    @property
    def num_active_parameters(self) -> int:
        """Number of parameters of the gate, of k experts and of the shared ones, without the noise of training."""
        gate = sum(parameter.numel() for parameter in self.router.active_parameters())
        return gate + round((self.k + self.num_shared_experts) * self.experts.parameters_per_expert)

    def extra_repr(self) -> str:
        """Return the sizes and the dispatch path."""
        return f"{super().extra_repr()}, dispatch={self.dispatch!r}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        version = local_metadata.get("version")
        is_old = f"{prefix}experts.weight1" in state_dict or (version is not None and version < self._version)
        saved = {name: any(key.startswith(f"{prefix}{name}.") for key in state_dict) for name in _OPTIONAL}
        own = {name: name in dict(self.named_modules()) for name in _OPTIONAL}
        if is_old and (saved != own or getattr(self.router, "normalize", False)):
            warnings.warn(
                f"{prefix or self._kind}: the state dict has format 2 or older, whose defaults were noisy=True,"
                f" normalize=False and num_shared_experts=0. Build the {self._kind} with the options of the saved one,"
                " which were **moe_heads.NOISY_TOP_K by default. A wrong normalize changes the outputs and nothing"
                " else.",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


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

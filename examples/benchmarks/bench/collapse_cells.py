"""Cells of the benchmark of collapse: heads and their training."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_heads import NOISY_TOP_K, Dense, Head, capacity, match_capacity
from moe_heads.capacity import HeadKind
from moe_heads.routers import BiasBalancedRouter, SwitchRouter
from moe_heads.routing import Router

__all__ = ["CIFAR", "DIGITS", "Cell", "build"]


@dataclass(frozen=True)
class Cell:
    """A head and its training; the defaults are those of the demo.

    Attributes:
        kind: "dense", "soft" or "sparse".
        head: Options of the head.
        router: "switch" or "bias", instead of the gate that the options describe.
        router_options: Options of that router.
        dense_width: Units of the dense head whose total parameters the head has.
        learning_rate: Learning rate of the network.
        gate_factor: Factor of the gate's learning rate.
        gate_std: Standard deviation of the gate's first weights, with a bias of zero; None for those of `nn.Linear`.
        gate_decay: Whether the gate has weight decay.
        epochs: Number of epochs.
    """

    kind: HeadKind = "sparse"
    head: Mapping[str, Any] = field(default_factory=dict)
    router: str | None = None
    router_options: Mapping[str, Any] = field(default_factory=dict)
    dense_width: int = 128
    learning_rate: float = 0.1
    gate_factor: float = 1.0
    gate_std: float | None = None
    gate_decay: bool = True
    epochs: int = 15

    @property
    def reference(self) -> str:
        """Name of the dense cell of equal parameters."""
        return "dense" if self.dense_width == 128 else f"dense, {self.dense_width} units"


def build(cell: Cell, in_features: int = 64, num_classes: int = 10) -> Head:
    """Build the head of a cell with the total parameters of its dense head."""
    dense = Dense(in_features, num_classes, width=cell.dense_width)
    if cell.kind == "dense":
        return dense
    options = dict(cell.head)
    if cell.router is not None:
        options["router"] = _router(cell, in_features, options.get("num_experts", 8))
    total = capacity(dense).total
    head = match_capacity(cell.kind, in_features, num_classes, total=total, tolerance=0.05, **options)
    if cell.gate_std is not None:
        gate = head.get_submodule("router.gate")
        for name, parameter in gate.named_parameters():
            parameter.data.normal_(std=cell.gate_std if name == "weight" else 0.0)
    return head


def _router(cell: Cell, in_features: int, num_experts: int) -> Router:
    if cell.router == "switch":
        return SwitchRouter(in_features, num_experts, **cell.router_options)
    return BiasBalancedRouter(in_features, num_experts, **cell.router_options)


def _paper(k: int, **changes: Any) -> Cell:
    """Return the gate of the paper, with changes."""
    return _sparse(k, NOISY_TOP_K, changes)


def _default(k: int, **changes: Any) -> Cell:
    """Return the default gate, written out, with changes."""
    default = {"noisy": False, "normalize": True, "num_shared_experts": 2, "balance": {"switch": 0.1}}
    return _sparse(k, default, changes)


def _sparse(k: int, gate: Mapping[str, Any], changes: Mapping[str, Any]) -> Cell:
    own = {name: value for name, value in changes.items() if name in Cell.__dataclass_fields__}
    options = {name: value for name, value in changes.items() if name not in own}
    return Cell(head={"k": k, **gate, **options}, **own)


def _digits() -> dict[str, Cell]:
    cells = {
        "dense": Cell("dense"),
        "dense, 1024 units": Cell("dense", dense_width=1024),
        "soft": Cell("soft"),
        "soft, no balance loss": Cell("soft", head={"balance": None}),
        "soft, kl 1.0": Cell("soft", head={"balance": {"kl": 1.0}}),
        "soft, no balance loss, temperature 2": Cell("soft", head={"balance": None, "temperature": 2.0}),
    }
    switch, both = {"switch": 0.1}, {"importance": 0.05, "load": 0.05}
    small = {"normalize": True, "gate_std": 1e-3}
    one: dict[str, Any] = {"num_shared_experts": 1}
    for k in (2, 1):
        rows = {
            "paper's gate": _paper(k),
            "both losses 1.0": _paper(k, balance={"importance": 1.0, "load": 1.0}),
            "both losses 0.05": _paper(k, balance=both),
            "no noise, switch 0.1": _paper(k, noisy=False, balance=switch),
            "z-loss 0.001": _paper(k, balance={"importance": 0.2, "load": 0.2, "z": 0.001}),
            "normalized": _paper(k, normalize=True),
            "gate starts small": _paper(k, gate_std=1e-3),
            "gate learns ten times slower": _paper(k, gate_factor=0.1),
            "gate learns three times faster": _paper(k, gate_factor=3.0),
            "gate without weight decay": _paper(k, gate_decay=False),
            "learning rate 0.05": _paper(k, learning_rate=0.05),
            "45 epochs": _paper(k, epochs=45),
            "16 experts": _paper(k, num_experts=16),
            "64 experts, 1024 units": _paper(k, num_experts=64, dense_width=1024),
            "shared expert": _paper(k, **one),
            "normalized, small, both losses 0.05": _paper(k, **small, balance=both),
            "normalized, small, no noise, switch 0.1": _paper(k, **small, noisy=False, balance=switch),
            "finalist: shared expert, no noise, switch 0.1": _default(k, **one, normalize=False),
            "finalist: the same, normalized": _default(k, **one),
            "finalist: the same, normalized, switch 0.03": _default(k, **one, balance={"switch": 0.03}),
            "finalist: the same, normalized, switch 0.05": _default(k, **one, balance={"switch": 0.05}),
            "finalist: one shared expert, normalized, small, switch 0.05": _default(
                k, **one, balance={"switch": 0.05}, gate_std=1e-3
            ),
            "finalist: two shared experts, normalized, switch 0.05": _default(k, balance={"switch": 0.05}),
            "finalist: two shared experts, normalized, switch 0.1 (default)": _default(k),
            "default, 16 experts": _default(k, num_experts=16),
            "default, 64 experts, 1024 units": _default(k, num_experts=64, dense_width=1024),
            "default, noise": _default(k, noisy=True),
            "default, no balance loss": _default(k, balance=None),
            "default, z-loss 0.001": _default(k, balance={"switch": 0.1, "z": 0.001}),
        }
        cells |= {f"k = {k}, {name}": cell for name, cell in rows.items()}
    return cells | _other_routers()


def _other_routers() -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    alone: dict[str, Any] = {"num_shared_experts": 0}
    stronger = {"normalize": True, "balance": {"switch": 0.1}}
    for k, bias in ((2, {"k": 2}), (1, {"k": 1})):
        cells |= {
            f"k = {k}, bias-balanced": Cell(head=alone, router="bias", router_options=bias),
            f"k = {k}, bias-balanced, update rate 0.01": Cell(
                head=alone, router="bias", router_options={**bias, "update_rate": 0.01}
            ),
            f"k = {k}, bias-balanced, two shared experts, normalized": Cell(
                router="bias", router_options={**bias, "normalize": True}
            ),
        }
    return cells | {
        "k = 1, Switch router": Cell(head=alone, router="switch"),
        "k = 1, Switch router, switch 0.1": Cell(
            head=alone, router="switch", router_options={"balance": {"switch": 0.1}}
        ),
        "k = 1, Switch router, two shared experts, normalized, switch 0.1": Cell(
            router="switch", router_options=stronger
        ),
    }


DIGITS = _digits()
CIFAR = {
    "dense": Cell("dense"),
    "soft": Cell("soft"),
    **{f"k = {k}, paper's gate": _paper(k) for k in (2, 1)},
    **{f"k = {k}, default": _default(k) for k in (2, 1)},
}
"""Cells on CIFAR-10, with the backbone, learning rate and schedule of the preset `cpu` of the study."""

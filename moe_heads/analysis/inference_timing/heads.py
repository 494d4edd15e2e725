"""What is known of the heads with a router: which they are, their arithmetic, their parts, and their dense twins."""

from collections.abc import Callable, Container, Sequence

from torch import nn

from moe_heads.analysis.inference_timing.calls import MODEL, Call, row_name
from moe_heads.head import Head
from moe_heads.routing import Router

__all__ = ["STAGES", "active_flops", "belongs", "part_name", "routed_heads", "stages_of", "twin_name"]

STAGES = ("router", "dispatch", "combine")
"""What runs in a head beside its experts, in order; they are what these leave of it."""


def routed_heads(model: nn.Module) -> dict[str, Head]:
    """The heads of this package in a model that own a router, by the name of their rows; it may be one itself."""
    return {
        row_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, Head) and any(isinstance(child, Router) for child in module.children())
    }


def twin_name(head: str, taken: Container[str] = ()) -> str:
    """Name of the rows of the dense head that stands beside a head, other than those that are taken."""
    name = f"{head}_dense"
    while name in taken:
        name += "_"
    return name


def part_name(head: str, part: str) -> str:
    """Dotted name of a part of a head, which may itself be the whole model."""
    return part if head == MODEL else f"{head}.{part}"


def belongs(name: str, head: str) -> bool:
    """Whether something is a head or a part of it."""
    return name == head or head == MODEL or name.startswith(f"{head}.")


def active_flops(head: Head, call: Call) -> int:
    """Theoretical operations of a call of a head, of the experts that are chosen alone."""
    return sum(head.flops(x.shape[0], x.shape[1] if x.dim() == 3 else 1).active for x in call.inputs)


def stages_of(head: Head, call: Call) -> dict[str, Call]:
    """What a call of a head does besides its modules, by name; see `Head.stages`."""
    found: dict[str, list[Callable[[], object]]] = {}
    for x in call.inputs:
        for name, stage in head.stages(x).items():
            found.setdefault(name, []).append(stage)
    return {name: Call(stages[0] if len(stages) == 1 else _all_of(stages)) for name, stages in found.items()}


def _all_of(stages: Sequence[Callable[[], object]]) -> Callable[[], object]:
    def run() -> None:
        for stage in stages:
            stage()

    return run

"""What an entry of the zoo says, and the page docs/zoo.md: what each analysis made of each module."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

__all__ = ["ANALYSES", "Entry", "ExpectedWarning", "Loader", "zoo_page"]

ANALYSES = ("sharpness", "loss_landscape", "expert_utilization", "inference_timing")

_HEADING = """# The module zoo

Written by tests/callbacks/test_zoo.py: `make test ARGS=tests/callbacks/test_zoo.py`.

Lightning's demos, models of torchvision, timm and transformers in a few lines of LightningModule, and common ways to
train, each small, trained for an epoch or two and then analyzed by all four callbacks. The test asserts for each that
the analyses changed no bit of its weights, buffers, gradients, optimizer states, metrics, attributes and hooks, nor of
the random number generators and the settings of torch, and that the results are sane. "unsupported": a warning says
why the analysis cannot run, and the run and the other analyses go on. "warned": a warning names a limit of its results.
"""

Loader = Callable[[], DataLoader[Any]]


@dataclass(frozen=True)
class ExpectedWarning:
    """What the warning of an analysis says (a regular expression), and its reason in a few words for the table."""

    message: str
    reason: str


@dataclass(frozen=True)
class Entry:
    """One module of the zoo.

    Attributes:
        name: For the test's id.
        title: For the table.
        build: Makes the module.
        train: Its training data, in a fixed order.
        val: Its validation data; None for a module that has none.
        trainer: Options of the Trainer.
        callbacks: Makes further callbacks, which stand before the analyses.
        loss_fn: The callbacks' argument.
        forward_fn: The callbacks' argument.
        unsupported: By analysis, the warning that is expected instead of a result.
        warned: By analysis, the warning that is expected with its results; the others have to succeed without one.
        plane: Whether the loss landscape gets its plane.
        has_experts: Whether there is a router of ours inside.
    """

    name: str
    title: str
    build: Callable[[], LightningModule]
    train: Loader
    val: Loader | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Callback]] = list
    loss_fn: Callable[[Any, Any], Tensor] | None = None
    forward_fn: Callable[[Any, Any], Any] | None = None
    unsupported: Mapping[str, ExpectedWarning] = field(default_factory=dict)
    warned: Mapping[str, ExpectedWarning] = field(default_factory=dict)
    plane: bool = False
    has_experts: bool = False


def zoo_page(entries: Sequence[Entry], outcomes: Mapping[str, Mapping[str, str]]) -> str:
    """The page.

    Args:
        entries: The zoo, a row each.
        outcomes: By name of the entry and analysis, the cell.
    """
    rows = [["module", *(analysis.replace("_", " ") for analysis in ANALYSES)], ["---"] * (1 + len(ANALYSES))]
    rows += [[entry.title, *(outcomes[entry.name][analysis] for analysis in ANALYSES)] for entry in entries]
    return "\n".join([_HEADING, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"

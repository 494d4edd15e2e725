"""One forward pass of a module, as a hook sees it."""

from typing import Any, NamedTuple

from torch import nn

__all__ = ["Pass", "UnknownDecisionError"]


class Pass(NamedTuple):
    """One forward pass of a module.

    Attributes:
        module: The module.
        args: Positional arguments.
        kwargs: Keyword arguments.
        output: What it returned.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def argument(self, position: int, *names: str) -> Any:
        """Return the argument at a position or of one of these names, or None."""
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), None)


class UnknownDecisionError(Exception):
    """The decisions of a router cannot be read from its pass. The message says why."""

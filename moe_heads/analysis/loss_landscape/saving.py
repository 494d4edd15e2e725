"""Something that is computed once instead of anew, and what is known of whether that changes a number."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from moe_heads.analysis.loss_landscape.calls import Call

__all__ = ["OTHER_OUTPUT", "Saving", "checking"]

OTHER_OUTPUT = "a module gave another output for the same inputs"

# Points at which what is replayed is made as well: both ends of a line or plane, and the point that comes next.
_NUM_PROOFS = 3


class Saving:
    """Calls that are replayed, until it turns out that they should not have been.

    The first points at which something is replayed are measured both ways, and their numbers are those of plain passes:
    so no number that was measured before a saving is given up rests on it.

    Args:
        is_on: Whether there is anything to save.

    Attributes:
        is_on: Whether calls are replayed.
        reason: Why they are no longer; "" where they are, or never were.
        was_used: Whether one was since the last proof.
        is_checking: Whether each replayed call is made as well and compared.
        has_doubt: Whether one of them gave something else.
    """

    def __init__(self, *, is_on: bool) -> None:
        self.is_on, self.reason = is_on, ""
        self.was_used = self.is_checking = self.has_doubt = False
        self.num_proofs_left = _NUM_PROOFS

    @property
    def needs_proof(self) -> bool:
        """Whether something was replayed that was not yet compared often enough with a plain pass."""
        return self.is_on and self.was_used and self.num_proofs_left > 0

    def prove(self) -> None:
        """One comparison more has found no difference."""
        self.num_proofs_left -= 1
        self.was_used = False

    def doubt(self) -> None:
        """What is moved from here on is moved along another direction: prove it there as well."""
        self.num_proofs_left = max(self.num_proofs_left, 1)

    def give_up(self, reason: str) -> None:
        """Go on without."""
        self.is_on, self.reason = False, reason

    def replay(self, call: Call, make: Callable[[], Any]) -> Any:
        """What a known call gave; while checking what it gives now."""
        self.was_used = True
        if not self.is_checking:
            return call.output
        made = make()
        self.has_doubt = self.has_doubt or not call.has_output(made)
        return made


@contextmanager
def checking(savings: Iterable[Saving]) -> Iterator[None]:
    """Make every call of the block, and compare it with what would have been replayed."""
    with ExitStack() as stack:
        for saving in savings:
            stack.callback(setattr, saving, "is_checking", saving.is_checking)
            saving.is_checking, saving.has_doubt = True, False
        yield

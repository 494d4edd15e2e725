"""Division of the time of a head, in units of the time of the dense head: where the theoretical speedup is lost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_heads.analysis.inference_timing.speedup import Gap
from moe_heads.analysis.inference_timing.stages import Part

__all__ = ["GapShares", "gap_shares"]


@dataclass(frozen=True)
class GapShares:
    """Time of a head at one batch size, in units of the time of the dense head of equal capacity.

    Attributes:
        head: Name of the head.
        batch_size: Samples of the batch.
        theoretical: Operations of the head over those of the dense head.
        parts: Time of each part of the head. They sum to the time of the head.
        launches: Time that the launches of its operators take at least, a share of all parts; None if unknown.
    """

    head: str
    batch_size: int
    theoretical: float
    parts: Mapping[str, float]
    launches: float | None

    @property
    def total(self) -> float:
        """Time of the head."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {share:.2g}" for name, share in self.parts.items())
        launches = "" if self.launches is None else f"; launches of operators are {self.launches:.2g} of it"
        return (
            f"At batch size {self.batch_size}, the head takes {self.total:.3g} times the time of the dense head for"
            f" {self.theoretical:.2g} times its operations: {parts}{launches}"
        )


def gap_shares(gap: Gap, parts: Sequence[Part]) -> list[GapShares]:
    """Return the division of a head's time at each batch size; empty outside eager mode, and without its parts."""
    found = []
    for point in gap.points if gap.mode == "eager" else ():
        inside = {part.name: part.ms for part in parts if (part.whole, part.batch_size) == (gap.head, point.batch_size)}
        total = sum(inside.values())
        if total <= 0:
            continue
        dense_ms = total * point.realized
        bound = point.head_bound
        found.append(
            GapShares(
                gap.head,
                point.batch_size,
                1 / point.theoretical,
                {name: ms / dense_ms for name, ms in inside.items()},
                None if bound is None else bound.launches_ms / dense_ms,
            )
        )
    return found

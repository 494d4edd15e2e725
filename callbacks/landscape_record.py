"""The cuts through the loss of one split, and how they are told to the loggers."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_heads.analysis import DirectionSweepResult, LossLandscapeResult, landscape_page
from moe_heads.callbacks._shared.reporting import Mesh, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Landscape", "landscape_report"]

_SUFFIXES = {"losses_fixed_routing": "_fixed_routing", "routing_flips": "_flips", "accuracies": "_accuracy"}


@dataclass(frozen=True)
class Landscape:
    """The cuts through the loss of one split.

    Attributes:
        line: Along the top Hessian eigenvector, of unit length; None where a layer has no second derivative.
        plane: On a plane of two directions; None for a split where it was not asked for.
        ended: Why one of them is missing; "" when all are there.
        sweep: Along several random directions; None where they were not asked for.
        trajectory: On the plane of the training run; None where it was not asked for.
    """

    line: LossLandscapeResult | None
    plane: LossLandscapeResult | None
    ended: str = ""
    sweep: DirectionSweepResult | None = None
    trajectory: LossLandscapeResult | None = None

    @property
    def cuts(self) -> dict[str, LossLandscapeResult]:
        """The line and the planes that are there, by name."""
        named = {"line": self.line, "plane": self.plane, "trajectory": self.trajectory}
        return {name: cut for name, cut in named.items() if cut is not None}

    @property
    def parts(self) -> Mapping[str, LossLandscapeResult | DirectionSweepResult]:
        """The cuts and the sweep, by name."""
        return self.cuts if self.sweep is None else {**self.cuts, "sweep": self.sweep}

    @property
    def partial(self) -> str:
        """Why one of them ended before its time or is missing; "" when all are whole."""
        return next((reason for reason in (self.ended, *(part.partial for part in self.parts.values())) if reason), "")


def landscape_report(result: Landscape, *, html: bool) -> Report:
    """Numbers, texts and figures of all parts, a surface of the plane, the arrays, and on request a page to turn."""
    metrics: dict[str, float] = {}
    figures: dict[str, Figure] = {}
    texts, files = [], {}
    for name, part in result.parts.items():
        metrics |= {f"{name}_{key}": value for key, value in part.metrics().items()}
        figures |= {f"{name}{suffix}": figure for suffix, figure in _figures(part)}
        texts.append(f"### {name.title()}\n\n{part.summary()}")
        files[f"{name}.npz"] = _arrays(part)
    if result.ended:
        texts.append(f"**Partial**: {result.ended}.")
    if html and result.cuts:
        files["landscape.html"] = landscape_page(result.cuts).encode()
    has_surface = result.plane is not None and result.plane.has_surface
    return Report(
        metrics=metrics | ({"partial": 1.0} if result.partial else {}),
        texts={"summary": "\n\n".join(texts)},
        figures=figures,
        meshes={"surface": Mesh(*result.plane.mesh())} if result.plane is not None and has_surface else {},
        files=files,
    )


def _figures(part: LossLandscapeResult | DirectionSweepResult) -> "Iterator[tuple[str, Figure]]":
    """That of the loss, and those of what else there is of a plane.

    Yields:
        What is added to the name of the part, and the figure.
    """
    yield "", part.plot()[0]
    if isinstance(part, LossLandscapeResult):
        for quantity in part.maps[1:]:
            yield _SUFFIXES[quantity], part.plot(quantity=quantity)[0]


def _arrays(part: Any) -> bytes:
    buffer = io.BytesIO()
    part.save(buffer)
    return buffer.getvalue()

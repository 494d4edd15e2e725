"""Result of the landscape callback for one split, and its report to the loggers."""

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
    """Landscapes of one split. Parts that were not requested are None.

    Attributes:
        line: Line along the top Hessian eigenvector, of unit length, or None if a layer has no second derivative.
        plane: Plane of two directions.
        ended: Reason why a part is missing, or "".
        sweep: Lines along several random directions.
        trajectory: Plane of the training run.
    """

    line: LossLandscapeResult | None
    plane: LossLandscapeResult | None
    ended: str = ""
    sweep: DirectionSweepResult | None = None
    trajectory: LossLandscapeResult | None = None

    @property
    def cuts(self) -> dict[str, LossLandscapeResult]:
        """The line and the planes that exist, by name."""
        named = {"line": self.line, "plane": self.plane, "trajectory": self.trajectory}
        return {name: cut for name, cut in named.items() if cut is not None}

    @property
    def parts(self) -> Mapping[str, LossLandscapeResult | DirectionSweepResult]:
        """The cuts and the sweep, by name."""
        return self.cuts if self.sweep is None else {**self.cuts, "sweep": self.sweep}

    @property
    def partial(self) -> str:
        """Reason why a part is missing or ended early, or ""."""
        return next((reason for reason in (self.ended, *(part.partial for part in self.parts.values())) if reason), "")


def landscape_report(result: Landscape, *, html: bool) -> Report:
    """Return metrics, texts, figures and arrays of all parts, the mesh of the plane, and optionally the HTML page."""
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
    """Plot the loss, and the other quantities of a plane.

    Yields:
        Suffix of the name of the part, and the figure.
    """
    yield "", part.plot()[0]
    if isinstance(part, LossLandscapeResult):
        for quantity in part.maps[1:]:
            yield _SUFFIXES[quantity], part.plot(quantity=quantity)[0]


def _arrays(part: Any) -> bytes:
    buffer = io.BytesIO()
    part.save(buffer)
    return buffer.getvalue()

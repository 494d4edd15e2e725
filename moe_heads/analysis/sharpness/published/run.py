"""PyHessian's eigenvalues, trace and density, called one after the other as a script would."""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from moe_heads.analysis._shared.progress import TimeUp
from moe_heads.analysis.sharpness.hessian.density import SpectralDensity, density_of
from moe_heads.analysis.sharpness.published.loader import Loader
from moe_heads.analysis.sharpness.published.loss_module import LossModule, pass_on

__all__ = ["Returned", "imported_pyhessian", "run_pyhessian"]


@dataclass(frozen=True, eq=False)
class Returned:
    """What PyHessian returned.

    Attributes:
        eigenvalues: In its order.
        vectors: Their vectors, a tensor for each parameter.
        samples: Those of its estimator of the trace.
        density: None where there is none.
        density_failure: Why, if it was asked for.
        num_power_steps: Products for the eigenvalues.
        num_products: All products.
    """

    eigenvalues: list[float]
    vectors: list[list[Tensor]]
    samples: list[float]
    density: SpectralDensity | None
    density_failure: str
    num_power_steps: int
    num_products: int


def imported_pyhessian() -> Any:
    """PyHessian's only class.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        from pyhessian import hessian
    except ImportError as error:
        raise ImportError(
            "the published procedure runs PyHessian, which is not installed: pip install pyhessian"
        ) from error
    return hessian


def run_pyhessian(
    module: LossModule, loader: Loader, device: torch.device, *, num_eigenvalues: int, density: bool
) -> Returned:
    """The three parts, with PyHessian's own settings.

    Args:
        module: The model and its loss.
        loader: The data.
        device: Device of both.
        num_eigenvalues: Number of eigenvalues.
        density: Also ask for the density.

    Raises:
        RuntimeError: If PyHessian fails in the eigenvalues or the trace.
        TimeUp: If the time of the loader's progress is over.
    """
    try:
        with _on(device), _expecting_graphs_in_grad():
            with _named("set-up"):
                theirs = imported_pyhessian()(module, pass_on, dataloader=loader, cuda=device.type == "cuda")
                theirs.device = device  # it knows no device but "cpu" and the current GPU
            with _named("eigenvalues"):
                eigenvalues, vectors = theirs.eigenvalues(top_n=num_eigenvalues)
                _check_finite(eigenvalues)
            num_power_steps = loader.num_passes
            with _named("trace"):
                samples = theirs.trace()
                _check_finite(samples)
            found, failure = _density(theirs) if density else (None, "")
    finally:
        loader.put_back()
    return Returned(eigenvalues, vectors, samples, found, failure, num_power_steps, loader.num_passes)


def _density(theirs: Any) -> tuple[SpectralDensity | None, str]:
    """Density, or why there is none."""
    if not _has_eig():
        # found out before the hundred products after which PyHessian would
        removed = "density: PyHessian 0.1 calls torch.eig, which torch removed in 1.13; its Lanczos steps were not run"
        return None, removed
    try:
        (nodes,), (weights,) = theirs.density()
        # started at one vector of random signs
        num_signs = sum(p.numel() for p in theirs.params)
        return density_of(_float64(nodes), _float64(weights), num_signs), ""
    except TimeUp:
        raise
    except Exception as error:  # whatever it is, the rest of the findings stands
        return None, f"density: PyHessian 0.1 failed with {type(error).__name__}: {error}"


def _has_eig() -> bool:
    try:
        cast(Any, torch).eig(torch.eye(1), eigenvectors=True)
    except (AttributeError, RuntimeError):
        return False
    return True


def _float64(numbers: Iterable[Any]) -> Tensor:
    return torch.tensor([float(number) for number in numbers], dtype=torch.float64)


@contextmanager
def _named(part: str) -> Iterator[None]:
    """Say in which part of PyHessian an error happened.

    Raises:
        RuntimeError: In place of whatever PyHessian raised.
        TimeUp: As it is.
    """
    try:
        yield
    except TimeUp:
        raise
    except Exception as error:
        raise RuntimeError(f"PyHessian 0.1 failed in its {part}: {type(error).__name__}: {error}") from error


def _check_finite(numbers: Sequence[float]) -> None:
    if not all(map(math.isfinite, numbers)):
        raise ArithmeticError(f"not all of its numbers are finite: {numbers}")


@contextmanager
def _expecting_graphs_in_grad() -> Iterator[None]:
    """Without torch's warning of the cycles between parameters and graphs: they are broken after each batch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph=True")
        yield


def _on(device: torch.device) -> Any:
    """Make ``device`` the current GPU, the only one that PyHessian knows."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

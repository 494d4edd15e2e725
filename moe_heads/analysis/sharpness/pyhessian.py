"""PyHessian 0.1 (Yao et al. 2020) as an engine of the sharpness analysis, with its known failures reported."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.arguments import check_arguments
from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.copies import on_copies
from moe_heads.analysis._shared.counting import BatchWeightFn
from moe_heads.analysis._shared.mean_check import check_mean
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis.sharpness.block import BlockCurvature, block_shares
from moe_heads.analysis.sharpness.hessian.basis import norm
from moe_heads.analysis.sharpness.hessian.blocks import default_blocks, places_of
from moe_heads.analysis.sharpness.hessian.operator import HessianOperator
from moe_heads.analysis.sharpness.hessian.parameters import Selection, selected_parameters
from moe_heads.analysis.sharpness.result import SharpnessResult

__all__ = ["pyhessian_sharpness"]

# PyHessian's own defaults, which it uses here. They are repeated for the messages and for ``converged``.
_RESIDUAL_LIMIT = 1e-3
_MAX_TRACE_SAMPLES = 100

# A larger standard error, as a fraction of the trace, is reported.
_TRACE_LIMIT = 0.05


def pyhessian_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    num_eigenvalues: int = 5,
    params: Selection | None = None,
    density: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
    batch_weight_fn: BatchWeightFn | None = None,
) -> SharpnessResult:
    """Return the top eigenvalues and the trace of the Hessian of a mean loss as PyHessian 0.1 computes them.

    For comparison with published figures. PyHessian runs with its own settings: deflated power iteration (at most 100
    steps for each eigenvalue, until it changes by less than 1e-3) and Hutchinson's estimator of the trace (at most 100
    samples, until the mean changes by less than 1e-3). `sharpness` needs a fraction of the products and certifies its
    numbers. A parameter that PyHessian cannot differentiate gets a row of zeros and is named in ``failures``. The model
    is evaluated inside `analysis_mode` and left bit for bit as it was, also after an error.

    Args:
        model: The model.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch, a deterministic function.
        batches: The data, all of it held in memory. A batch that does not fit into memory is not cut.
        num_eigenvalues: Number of eigenvalues, at most that of parameters. arXiv 2601.15021 reports five.
        params: Parameters to differentiate, as in `sharpness`.
        density: Whether to report that the density is missing. PyHessian 0.1 calls a function that torch has removed.
        seed: Seed of torch's global generators, from which PyHessian draws.
        progress: Shows the products done, and ends the analysis at its time limit.
        batch_weight_fn: Weight of a batch, as in `sharpness`.

    Returns:
        The eigenvalues in PyHessian's order, with residuals computed by our own products, and a sentence for each
        failure. Values that PyHessian does not compute are nan.

    Raises:
        ImportError: If PyHessian is not installed.
        ValueError: If an argument is out of range, or the loss or its second derivative is not finite.
        RuntimeError: If a layer has no second derivative, or PyHessian fails.
        TimeUp: If the time of the progress is over.
    """
    pyhessian = _import_pyhessian()
    check_arguments(model=model, loss_fn=loss_fn, seed=seed, progress=progress, batch_weight_fn=batch_weight_fn)
    selected = selected_parameters(model, params)
    progress = progress or Progress()
    given = Batches.of(batches, batch_weight_fn=batch_weight_fn)
    check_mean(model, loss_fn, given, progress=progress, seed=seed)
    loss_fn = on_copies(loss_fn)
    with analysis_mode(model, seed):
        chosen = {id(p) for p in selected.values()}
        for p in model.parameters():
            p.requires_grad_(id(p) in chosen)  # PyHessian differentiates by every parameter that requires a gradient
        device = next(iter(selected.values())).device
        data = given.to(device)
        # Graphs kept by the operator would stay in memory next to those of PyHessian, for a handful of products.
        operator = HessianOperator(model, loss_fn, data, params, graph_memory=0, progress=progress)
        operator.matvec(torch.ones(operator.num_parameters))  # its errors say more than PyHessian's
        loader = _ProxyLoader(data, progress)
        unused = UnusedParameters()
        module, is_on_gpu = _LossModule(model, loss_fn), device.type == "cuda"
        engine = pyhessian(
            module, lambda loss, proxy: _LossProxy(selected, unused, loss), dataloader=loader, cuda=is_on_gpu
        )
        engine.device = device  # it sets "cuda" itself, which is the current GPU
        with torch.cuda.device(device) if is_on_gpu else nullcontext():
            with _named_errors("eigenvalues"):
                eigenvalues, parts = engine.eigenvalues(top_n=num_eigenvalues)
                _check_finite(eigenvalues)
            num_power_steps = loader.num_products
            with _named_errors("trace"):
                samples = engine.trace()
                _check_finite(samples)
        flat = torch.stack([torch.cat([part.detach().reshape(-1) for part in vector]) for vector in parts])
        vectors = F.normalize(flat, eps=torch.finfo(flat.dtype).tiny).to(operator.dtype)
        residuals = [_residual(operator, value, vector) for value, vector in zip(eigenvalues, vectors, strict=True)]
    vectors = vectors.cpu()
    spread = torch.tensor(samples, dtype=torch.float64)
    trace = float(spread.mean())
    stderr = float(spread.std() / math.sqrt(len(samples))) if len(samples) > 1 else math.inf
    places = places_of(default_blocks(model, operator.slices), operator.slices)
    blocks = {name: _shares_alone(vectors, place) for name, place in places.items()}
    failures = [*_eigenvalue_failures(eigenvalues, residuals), *_trace_failures(samples, trace, stderr)]
    failures += unused.failures(selected)
    if density:
        failures.append("density: PyHessian 0.1 calls torch.eig, which torch removed in 1.13. It was not run")
    return SharpnessResult(
        eigenvalues=tuple(eigenvalues),
        residuals=tuple(residuals),
        lambda_min=math.nan,
        lambda_min_residual=math.nan,
        trace=trace,
        trace_stderr=stderr,
        frobenius_norm=math.nan,
        density=None,
        blocks=blocks,
        experts={},
        num_steps=num_power_steps,
        num_probes=len(samples),
        num_products=loader.num_products,
        num_samples=operator.num_samples,
        num_parameters=operator.num_parameters,
        eigenvalues_converged=max(residuals) <= _RESIDUAL_LIMIT,
        trace_converged=stderr <= _TRACE_LIMIT * abs(trace),
        graph_mode="rebuilt",
        seed=seed,
        parameter_names=operator.names,
        eigenvectors=vectors,
        engine="pyhessian",
        failures=tuple(failures),
    )


@dataclass(frozen=True)
class BatchProxy:
    """A batch of any kind with the two methods that PyHessian calls on a tensor of inputs."""

    batch: Batch
    weight: float

    def size(self, dim: int) -> float:
        """Return the weight of the batch, its number of samples by default."""
        return self.weight

    def to(self, device: torch.device) -> "BatchProxy":
        """Return the batch, which is on the device of the model already."""
        return self


class _ProxyLoader:
    """The batches as PyHessian's data loader. One pass is one Hessian-vector product."""

    def __init__(self, data: Batches, progress: Progress) -> None:
        self._proxies = [BatchProxy(piece.batch, piece.weight) for piece in data.pieces]
        self._progress = progress
        self.num_products = 0

    def __iter__(self) -> Iterator[tuple[BatchProxy, BatchProxy]]:
        for proxy in self._proxies:
            self._progress.tick()
            yield proxy, proxy
        self.num_products += 1
        self._progress.step(self.num_products)


@dataclass
class UnusedParameters:
    """Names of the parameters whose gradient in some batch is missing (idle) or constant (linear)."""

    idle: set[str] = field(default_factory=set)
    linear: set[str] = field(default_factory=set)

    def failures(self, order: Iterable[str]) -> list[str]:
        """Return a sentence for each of the two kinds that occurred, with the first name in ``order``."""
        causes = {
            "idle parameter: no gradient reaches {}": (self.idle, "takes the missing gradient for the number 0"),
            "linear parameter: the gradient is constant for {}": (self.linear - self.idle, "differentiates it again"),
        }
        sentences = []
        for what, (names, why) in causes.items():
            listed = [name for name in order if name in names]
            if listed:
                first = listed[0] if len(listed) == 1 else f"{listed[0]} and {len(listed) - 1} more"
                sentences.append(
                    f"{what.format(first)} in at least one batch, which crashes PyHessian 0.1 because it {why}."
                    " 0·p was added to the gradient, which changes nothing else"
                )
        return sentences


class _LossModule(nn.Module):
    """A model that returns its loss, as PyHessian's ``model``."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        # In a partial, because a loss that is a module would add its parameters to those of the model.
        self._loss = partial(loss_fn, model)

    def forward(self, proxy: BatchProxy) -> Tensor:
        return self._loss(proxy.batch).reshape(())


@dataclass
class _LossProxy:
    """A loss whose ``backward`` writes gradients into the selected parameters and into no other tensor."""

    params: Mapping[str, Tensor]
    unused: UnusedParameters
    loss: Tensor

    def backward(self, create_graph: bool) -> None:
        params = list(self.params.values())
        gradient: Sequence[Tensor | None] = torch.autograd.grad(self.loss, params, create_graph=True, allow_unused=True)
        for (name, p), part in zip(self.params.items(), gradient, strict=True):
            # PyHessian differentiates the gradient by the parameter, on which it has to depend.
            if part is None:
                self.unused.idle.add(name)
                part = 0.0 * p
            elif part.grad_fn is None:
                self.unused.linear.add(name)
                part = part + 0.0 * p
            p.grad = part


def _import_pyhessian() -> Any:
    try:
        from pyhessian import hessian
    except ImportError as error:
        raise ImportError(
            "engine='pyhessian': expected the package pyhessian, which is not installed. Install the extra:"
            " pip install 'moe-heads[pyhessian]'"
        ) from error
    return hessian


@contextmanager
def _named_errors(part: str) -> Iterator[None]:
    """Name the part of PyHessian in which an error occurs; `TimeUp` passes unchanged."""
    try:
        yield
    except TimeUp:
        raise
    except Exception as error:
        raise RuntimeError(f"PyHessian 0.1 failed in its {part}: {type(error).__name__}: {error}") from error


def _check_finite(numbers: Sequence[float]) -> None:
    if not all(map(math.isfinite, numbers)):
        raise ArithmeticError(f"not all of its numbers are finite: {numbers}")


def _residual(operator: HessianOperator, value: float, vector: Tensor) -> float:
    if value == 0 or not bool(vector.any()):
        return math.inf
    return norm(operator.matvec(vector) - value * vector) / abs(value)


def _shares_alone(vectors: Tensor, places: Sequence[slice]) -> BlockCurvature:
    size = sum(place.stop - place.start for place in places)
    return BlockCurvature(size, block_shares(vectors, places), trace=math.nan, trace_stderr=math.inf)


def _eigenvalue_failures(values: Sequence[float], residuals: Sequence[float]) -> Iterator[str]:
    for rank, (value, following) in enumerate(pairwise(values), start=1):
        if abs(value) < abs(following):
            bars = "" if min(value, following) >= 0 else "|"
            yield (
                f"order: {bars}λ{rank}{bars} < {bars}λ{rank + 1}{bars} ({value:.4g} and {following:.4g}): the power"
                f" iteration for λ{rank} stopped before it converged"
            )
    negative = [f"λ{rank} = {value:.4g}" for rank, value in enumerate(values, start=1) if value < 0]
    if negative:
        yield (
            f"sign: {', '.join(negative)}: power iteration finds the eigenvalues that are largest in absolute value,"
            " so larger ones, which are positive, may be missing"
        )
    rough = [f"λ{rank} {size:.1e}" for rank, size in enumerate(residuals, start=1) if size > _RESIDUAL_LIMIT]
    if rough:
        yield (
            f"residual: ‖Hv − λv‖/|λ| is above {_RESIDUAL_LIMIT:g} ({', '.join(rough)}): the power iteration stops when"
            " the value changes little, not when the vector has converged"
        )


def _trace_failures(samples: Sequence[float], trace: float, stderr: float) -> Iterator[str]:
    if len(samples) > 1 and sum(samples[:-1]) / (len(samples) - 1) + 1e-6 < 0:
        yield (
            f"trace: PyHessian stopped after {len(samples)} samples because its mean was negative: its stopping rule"
            " divides by the trace without its absolute value"
        )
    if stderr > _TRACE_LIMIT * abs(trace):
        why = "it takes no more" if len(samples) == _MAX_TRACE_SAMPLES else "the mean changed little, accurate or not"
        yield (
            f"trace: {trace:.4g} has a standard error of {stderr:.2g} at sample {len(samples)}, where PyHessian"
            f" stopped: {why}"
        )

"""Hessian analyses of other libraries, each with its best known settings through its public interface.

PyHessian is installed by ``pip install .[dev]``. Create a folder for ``--peers`` with the others by

    uv pip install --target FOLDER --no-deps curvlinops-for-pytorch hessian-eigenthings==1.0.0a5 landscaper \
        backpack-for-pytorch einops einconv linear_operator opt-einsum jaxtyping wadler-lindig unfoldNd mpmath \
        pandas gudhi topopy nglpy treelib coloraide drawsvg

A row holds CPU seconds and products of each part ("eigen", "trace", "density"), results, errors, and "missed": the
number of our top eigenvalues without a match in theirs within one percent.
"""

import contextlib
import importlib
import importlib.metadata
import io
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.hessian_problem import Account, Counted, Problem, Row, described

__all__ = ["DISTRIBUTIONS", "PEERS", "pyhessian_equal", "unit_products", "versions"]

DISTRIBUTIONS = {
    "pyhessian": "PyHessian",
    "curvlinops": "curvlinops-for-pytorch",
    "eigenthings": "hessian-eigenthings",
    "landscaper": "landscaper",
}
_MODULES = {"eigenthings": "hessian_eigenthings"}

# Name, fraction of the tolerance at which a vector is accurate, and whether it is relative to the last eigenvalue.
_END_RULES = (("relative", 0.7, False), ("relative", 0.4, False), ("absolute", 1.0, True), ("absolute", 0.3, True))

Vectors = list[Tensor]


def versions() -> tuple[dict[str, str], dict[str, str]]:
    """Return the versions of the peers that can be imported, and the import errors of the others."""
    found, missing = {}, {}
    for peer, distribution in DISTRIBUTIONS.items():
        try:
            with _quiet():
                importlib.import_module(_MODULES.get(peer, peer))
            found[peer] = importlib.metadata.version(distribution)
        except ImportError as error:
            missing[peer] = str(error)
    return found, missing


def unit_products(problem: Problem, peers: list[str]) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Set up one Hessian-vector product of each peer; return the products, and the errors of peers that fail."""
    vector = torch.randn(problem.num_parameters, generator=torch.Generator().manual_seed(problem.seed))
    makers: dict[str, dict[str, Callable[[Problem], Callable[[Tensor], object]]]] = {
        "pyhessian": {"pyhessian": _pyhessian_product, "pyhessian_one_batch": _pyhessian_one_batch_product},
        "curvlinops": {"curvlinops": lambda own: _curvlinops_operator(own)[0].__matmul__},
        "eigenthings": {"eigenthings": lambda own: _eigenthings_operator(own)[0].matvec},
        "landscaper": {"landscaper_cached": _landscaper_product},
    }
    calls, errors = {}, {}
    for name, make in (pair for peer in peers for pair in makers[peer].items()):
        try:
            with _quiet():
                call = _quietly(make(problem.apart()), vector)
            call()
            calls[name] = call
        except Exception as error:  # a library under test may raise anything
            errors[name] = described(error)
    return calls, errors


def pyhessian(problem: Problem, known: Row) -> Row:
    """Run PyHessian as shipped: a loader of batches, power iteration, Hutchinson, its stopping rules, its density."""
    own = problem.apart()
    analysis = _pyhessian(own)
    counted = analysis.dataloader_hv_product = Counted(analysis.dataloader_hv_product)
    account = Account(counted)
    with _quiet():
        torch.manual_seed(problem.seed)
        pairs = account.part("eigen", lambda: analysis.eigenvalues(top_n=problem.num_eigenvalues))
        samples = account.part("trace", analysis.trace)
        # the density fails after its last step, so a few steps show the error too
        account.part("density", lambda: analysis.density(iter=2))
    if pairs is not None:
        _add_pairs(account.row, problem, known, pairs[0], [_flat(parts) for parts in pairs[1]])
    if samples is not None:
        account.row["trace_samples"] = samples
        _add_trace(account.row, known, float(np.mean(samples)))
    return account.total("eigen", "trace")


def pyhessian_equal(problem: Problem, known: Row) -> Row:
    """Run PyHessian's power iteration until the true residuals of its pairs meet the tolerance.

    Its own stopping rule uses changes of the eigenvalue. Here its loop ends, with its own products, as soon as the
    residual of the vector is small enough, without a superfluous product. The limit is slightly below the tolerance,
    since its last step reintroduces errors of earlier pairs. If later pairs stall because of these errors, all pairs
    use the residual limit of the last eigenvalue. Only the successful run counts.
    """
    smallest = abs(known["eigenvalues"][-1])
    runs: list[Row] = []
    for rule, share, absolute in _END_RULES:
        analysis = _pyhessian(problem.apart())
        watched = _EndWhenAccurate(
            analysis.dataloader_hv_product, share * problem.tolerance, smallest if absolute else 0.0
        )
        counted = analysis.dataloader_hv_product = Counted(watched)
        account = Account(counted)
        with _quiet():
            torch.manual_seed(problem.seed)
            options = {"maxIter": 10**6, "tol": _EndWhenAccurate.TINY, "top_n": problem.num_eigenvalues}
            pairs = account.part("eigen", partial(analysis.eigenvalues, **options))
        account.row["rule"] = f"{rule} {share}"
        runs.append(account.total("eigen"))
        if pairs is not None:
            _add_pairs(account.row, problem, known, pairs[0], [_flat(parts) for parts in pairs[1]])
            if max(account.row["residuals"]) <= problem.tolerance:
                break
    account.row["reached"] = "residuals" in account.row and max(account.row["residuals"]) <= problem.tolerance
    return runs[-1] | {"runs": runs}


def curvlinops(problem: Problem, known: Row) -> Row:
    """Run scipy's eigsh on the operator of curvlinops, its XTrace, and its Lanczos density.

    XTrace receives the required budget, and the density the largest eigenvalue. The determinism check is off.
    """
    from scipy.sparse.linalg import eigsh

    library = importlib.import_module("curvlinops")
    operator, counted = _curvlinops_operator(problem.apart())
    account = Account(counted)
    k, start = problem.num_eigenvalues, np.random.default_rng(problem.seed).standard_normal(problem.num_parameters)
    arguments = {"which": "LA", "tol": problem.tolerance, "v0": start.astype(np.float32)}
    with _quiet():
        torch.manual_seed(problem.seed)
        pairs = account.part("eigen", lambda: eigsh(operator.to_scipy(np.float32), k, **arguments))
        trace = account.part("trace", lambda: float(library.xtrace(operator, 2 * known["trace_vectors"])))
        bounds = (None, float(max(known["eigenvalues"] if pairs is None else pairs[0])))
        density = account.part(
            "density",
            lambda: library.lanczos_approximate_spectrum(operator, problem.density_steps, boundaries=bounds),
        )
    if density is not None:
        account.row["density_grid"] = density
    if pairs is not None:
        _add_pairs(account.row, problem, known, list(map(float, pairs[0])), list(torch.from_numpy(pairs[1].T.copy())))
    if trace is not None:
        _add_trace(account.row, known, trace)
    return account.total("eigen", "trace", "density")


def eigenthings(problem: Problem, known: Row) -> Row:
    """Run Lanczos of hessian-eigenthings with the required number of steps, its Hutch++ and its quadrature density.

    The library takes a number of steps instead of a tolerance. The first run uses its default. Later runs start from
    our number of steps and add two at a time until convergence. Only the last run counts.
    """
    library = importlib.import_module("hessian_eigenthings")
    operator, counted = _eigenthings_operator(problem.apart())
    runs: list[Row] = []
    pairs = None
    default, ours = 2 * problem.num_eigenvalues, int(known["num_steps"])
    for steps in (default, *(steps for steps in range(ours, ours + 20, 2) if steps > default)):
        account = Account(counted)
        with _quiet():
            options = {"k": problem.num_eigenvalues, "max_iter": steps, "tol": problem.tolerance}
            pairs = account.part("eigen", partial(library.lanczos, operator, which="LA", seed=problem.seed, **options))
        runs.append(account.row | {"steps": steps})
        if pairs is None or bool(pairs.converged.all()):
            break
    with _quiet():
        num_products = 3 * known["trace_vectors"]
        trace = account.part("trace", lambda: library.trace(operator, num_matvecs=num_products, seed=problem.seed))
        options = {"num_runs": 1, "lanczos_steps": problem.density_steps, "seed": problem.seed}
        density = account.part("density", partial(library.spectral_density, operator, **options))
    if density is not None:
        account.row["density_grid"] = density.grid, density.density
    if pairs is not None:
        _add_pairs(account.row, problem, known, pairs.eigenvalues.tolist(), list(pairs.eigenvectors))
    if trace is not None:
        _add_trace(account.row, known, trace.estimate)
        account.row["trace_stderr"] = trace.stderr
    return account.total("eigen", "trace", "density") | {"runs": runs}


def landscaper(problem: Problem, known: Row) -> Row:
    """Run Landscaper's copy of PyHessian with its cache of graphs, which makes products a third cheaper."""
    own = problem.apart()
    account = Account(Counted(float))
    library = importlib.import_module("landscaper")
    arguments = (own.model, own.criterion, own.batches, "cpu")
    with _quiet():
        analysis = account.part("setup", lambda: library.PyHessian(*arguments, try_cache=True))
        if analysis is None:
            return account.total("setup")
        counted = analysis.hv_product = Counted(analysis.hv_product)
        row, account = account.row, Account(counted)
        account.row |= row
        torch.manual_seed(problem.seed)
        pairs = account.part("eigen", lambda: analysis.eigenvalues(top_n=problem.num_eigenvalues))
        trace = account.part("trace", analysis.trace)
        density = account.part("density", lambda: analysis.density(iter=3))
    if pairs is not None:
        _add_pairs(account.row, problem, known, pairs[0], [_flat(parts) for parts in pairs[1]])
    if trace is not None:
        _add_trace(account.row, known, float(trace))
    if density is not None:
        shapes = {name: list(np.shape(values[0])) for name, values in zip(("nodes", "weights"), density, strict=True)}
        account.row["density_of_3_steps"] = shapes | {"complex": bool(np.iscomplexobj(np.asarray(density[0])))}
    return account.total("setup", "eigen", "trace")


PEERS: dict[str, Callable[[Problem, Row], Row]] = {
    "pyhessian": pyhessian,
    "curvlinops": curvlinops,
    "eigenthings": eigenthings,
    "landscaper": landscaper,
}


class _EndWhenAccurate:
    """A wrapper of PyHessian's product that ends its loop by repeating the last eigenvalue once the residual is small.

    Args:
        product: Product with a vector in parts; returns the Rayleigh quotient and Hv in parts.
        tolerance: Required residual as a fraction of the eigenvalue.
        absolute: If positive, the residual is a fraction of this value instead.
        patience: Number of products without a smaller residual after which the run fails.
    """

    TINY = 1e-12
    """Tolerance for PyHessian's stopping rule that only equal eigenvalues meet."""

    def __init__(
        self, product: Callable[[Vectors], tuple[float, Vectors]], tolerance: float, absolute: float, patience: int = 60
    ) -> None:
        self._product, self._tolerance, self._absolute, self._patience = product, tolerance, absolute, patience
        self._last: float | None = None
        self._best, self._since_best = math.inf, 0

    def __call__(self, vector: Vectors) -> tuple[float, Vectors]:
        """Return the product."""
        value, image = self._product(vector)
        squares = sum(float((h - value * v).square().sum()) for h, v in zip(image, vector, strict=True))
        residual = math.sqrt(squares)
        last = self._last
        if last is not None and residual <= self._tolerance * (self._absolute or abs(value)):
            self._last, self._best, self._since_best = None, math.inf, 0
            return last, image
        self._since_best += 1
        if residual < 0.98 * self._best:
            self._best, self._since_best = residual, 0
        if self._since_best > self._patience:
            raise RuntimeError(f"stopped: {self._patience} products without a residual below {self._best:.2e}")
        # two eigenvalues must not be equal by rounding before the vector is accurate
        self._last = value = value * (1 + 1e-9) if value == last else value
        return value, image


def _pyhessian(own: Problem) -> Any:
    library = importlib.import_module("pyhessian")
    return library.hessian(own.model, own.criterion, dataloader=own.batches, cuda=False)


def _pyhessian_product(own: Problem) -> Callable[[Tensor], object]:
    analysis = _pyhessian(own)
    return lambda vector: analysis.dataloader_hv_product(_parts(own, vector))


def _pyhessian_one_batch_product(own: Problem) -> Callable[[Tensor], object]:
    """Use all samples as one batch, whose graph PyHessian keeps when it is given data instead of a loader."""
    library = importlib.import_module("pyhessian")
    data = tuple(torch.cat(tensors) for tensors in zip(*own.batches, strict=True))
    analysis = library.hessian(own.model, own.criterion, data=data, cuda=False)
    product = importlib.import_module("pyhessian.utils").hessian_vector_product
    return lambda vector: product(analysis.gradsH, analysis.params, _parts(own, vector))


def _curvlinops_operator(own: Problem) -> tuple[Any, Counted]:
    """Return the operator for one vector at a time: on a CPU, its batched products cost more time and much memory."""
    library = importlib.import_module("curvlinops")
    operator = library.HessianLinearOperator(
        own.model, own.criterion, own.params, own.batches, check_deterministic=False
    )
    counted = Counted(operator._matmat)

    def columns(matrix: Vectors) -> Vectors:
        products = [counted([part[..., i : i + 1] for part in matrix]) for i in range(matrix[0].shape[-1])]
        return [torch.cat(parts, dim=-1) for parts in zip(*products, strict=True)]

    operator._matmat = columns
    return operator, counted


def _eigenthings_operator(own: Problem) -> tuple[Any, Counted]:
    library = importlib.import_module("hessian_eigenthings")
    operator = library.HessianOperator(own.model, own.batches, library.supervised_loss(own.criterion))
    counted = operator.matvec = Counted(operator.matvec)
    return operator, counted


def _landscaper_product(own: Problem) -> Callable[[Tensor], object]:
    library = importlib.import_module("landscaper")
    analysis = library.PyHessian(own.model, own.criterion, own.batches, "cpu", try_cache=True)
    return lambda vector: analysis.hv_product(_parts(own, vector))


def _quietly(product: Callable[[Tensor], object], vector: Tensor) -> Callable[[], object]:
    def call() -> object:
        with _quiet():
            return product(vector)

    return call


def _add_pairs(row: Row, problem: Problem, known: Row, eigenvalues: list[float], vectors: list[Tensor]) -> None:
    row["eigenvalues"] = eigenvalues
    found = torch.tensor(eigenvalues)
    row["missed"] = sum(bool((found / value - 1).abs().min() > 0.01) for value in known["eigenvalues"])
    row["residuals"] = problem.residuals(eigenvalues, vectors)


def _add_trace(row: Row, known: Row, trace: float) -> None:
    row["trace"] = trace
    row["trace_off_ours"] = trace / known["trace"] - 1


def _flat(parts: Vectors) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in parts])


def _parts(own: Problem, vector: Tensor) -> Vectors:
    return [part.view_as(p) for part, p in zip(vector.split([p.numel() for p in own.params]), own.params, strict=True)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress progress bars, output and warnings."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield

"""Reference values in float64: a long Lanczos run by plain double backward, independent of all candidates.

The basis is kept in float32 to save memory, and orthogonalized twice in each step. The error of an eigenvalue is the
square of that of its vector, so that it stays near 1e-12 relative to the largest.
"""

import copy
import math

import torch
from torch import Tensor

from bench.hessian_problem import Problem, Row

__all__ = ["density_distance", "oracle"]


def oracle(problem: Problem, steps: int, probes: int, *, seed: int = 12345) -> Row:
    """Return the top eigenvalues, the quadrature of the density, and the trace with its standard error.

    Args:
        problem: The Hessian.
        steps: Lanczos steps. The space must hold the top eigenvalues, and the residuals show whether it does.
        probes: Random vectors for the trace outside the Krylov space.
        seed: Seed of the random vectors, which differ from those of the candidates.
    """
    own = Problem(
        copy.deepcopy(problem.model).double(),
        [(x.double() if x.is_floating_point() else x, y) for x, y in problem.batches],
    )
    kept = [own.differentiated_gradient(batch) for batch in own.batches]

    def product(vector: Tensor) -> Tensor:
        total = torch.zeros_like(vector)
        for gradient in kept:
            total += own.derivative(gradient, vector)
        return total / len(kept)

    generator = torch.Generator().manual_seed(seed)
    dim = own.num_parameters
    basis = torch.empty(min(steps, dim), dim)
    alphas: list[float] = []
    betas: list[float] = []
    vector = torch.randn(dim, generator=generator, dtype=torch.float64)
    for step in range(len(basis)):
        vector = vector / vector.norm()
        basis[step] = vector
        image = product(basis[step].double())
        alphas.append(float(basis[step].double() @ image))
        vector = image
        for _ in range(2):
            vector = vector - _projected(basis[: step + 1], vector)
        betas.append(float(vector.norm()))
    inner = torch.tensor(betas[:-1], dtype=torch.float64)
    diagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(diagonal + torch.diag(inner, 1) + torch.diag(inner, -1))
    samples = []
    for _ in range(probes):
        probe = torch.randint(0, 2, (dim,), generator=generator).double() * 2 - 1
        probe = probe - _projected(basis, probe)
        samples.append(float(probe @ product(probe)))
    found = torch.tensor(samples, dtype=torch.float64)
    k = problem.num_eigenvalues
    residuals = betas[-1] * vectors[-1].abs().flip(0)[:k] / values.flip(0)[:k].abs()
    return {
        "steps": steps,
        "eigenvalues": values.flip(0)[:k].tolist(),
        "residuals": residuals.tolist(),
        "trace": sum(alphas) + float(found.mean()),
        "trace_stderr": float(found.std()) / math.sqrt(probes),
        "nodes": values.tolist(),
        "weights": vectors[0].square().tolist(),
    }


def density_distance(reference: Row, grid: Tensor, values: Tensor) -> float:
    """Return the Wasserstein distance of a density on a grid to the reference, over the largest eigenvalue.

    It includes the broadening that a library chose.
    """
    nodes, weights = (torch.tensor(reference[name], dtype=torch.float64) for name in ("nodes", "weights"))
    points, masses = grid.double(), values.double()
    masses = masses / masses.sum()
    places, order = torch.cat([nodes, points]).sort()
    jumps = torch.cat([weights / weights.sum(), -masses])[order].cumsum(0)
    distance = float((jumps[:-1].abs() * places.diff()).sum())
    return distance / float(max(reference["eigenvalues"]))


def _projected(basis: Tensor, vector: Tensor) -> Tensor:
    """Return the part of a vector in the span of float32 rows, by pieces to avoid a copy of the basis in float64."""
    total = torch.zeros_like(vector)
    for rows in basis.split(4):
        wide = rows.double()
        total += wide.T @ (wide @ vector)
    return total

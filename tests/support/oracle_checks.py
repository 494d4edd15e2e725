"""What the oracle demands of a result of sharpness, and what it counts over many."""

import copy
import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from scipy.stats import binom
from torch import Tensor

from moe_heads.analysis.sharpness.function import sharpness
from moe_heads.analysis.sharpness.hessian import SpectralDensity
from moe_heads.analysis.sharpness.result import SharpnessResult
from tests.support.oracle_cases import Case, Problem
from tests.support.oracle_hessians import hessian_of_batches
from tests.support.oracle_losses import HABITS
from tests.support.untouched import untouched

__all__ = ["Outcome", "Tally", "outcome_of"]

# Rounding of a sum of products, over the norm of the Hessian.
_ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-9}


@dataclasses.dataclass
class Outcome:
    """What came of a case.

    Attributes:
        case: The case.
        violations: By kind of demand, what was wrong.
        converged: Whether the eigenvalues converged.
        rejected: Whether the analysraises an error a loss that changes its batch, or that is not finite.
        trace_error: Error of the trace in standard errors; None where the trace is exact, or only rounding is left.
        block_error: The same for one of the blocks.
        density_share: Share of the grid on which the density is within two standard errors; None for an exact one.
        warned: The warnings.
    """

    case: Case
    violations: dict[str, str] = dataclasses.field(default_factory=dict)
    converged: bool = False
    rejected: bool = False
    trace_error: float | None = None
    block_error: float | None = None
    density_share: float | None = None
    warned: tuple[str, ...] = ()

    def __str__(self) -> str:
        found = "; ".join(f"{kind}: {text}" for kind, text in self.violations.items())
        return f"{self.case}\n    {found}"


def outcome_of(case: Case) -> Outcome:
    """Run the analysis of a case and hold its result against the dense Hessian."""
    problem, outcome = case.problem(), Outcome(case)
    hessian = hessian_of_batches(problem.exact_model, problem.loss_fn, problem.exact_batches, case.sizes, problem.names)
    is_finite = bool(hessian.isfinite().all())
    asymmetry = float((hessian - hessian.T).norm()) if is_finite else 0.0
    assert asymmetry <= 1e-8 * float(hessian.norm()) + 1e-12 or not is_finite, f"the oracle is wrong: {case}"
    options = dict(case.options)
    options["num_eigenvalues"] = min(options["num_eigenvalues"], len(hessian))
    if "basis_memory" in options:  # one vector more than the fewest
        vectors = min(options["num_eigenvalues"] + 4, len(hessian))
        options["basis_memory"] = vectors * len(hessian) * case.dtype.itemsize
    result = _result(problem, options, None if case.part is None else problem.names, outcome)
    if is_finite and "finite" in outcome.violations.get("error", ""):
        narrow = hessian_of_batches(problem.model, problem.loss_fn, problem.batches, case.sizes, problem.names)
        is_finite = bool(narrow.isfinite().all())
    if not is_finite:
        # the loss overflows: nothing but an error that says so is right
        outcome.rejected = "finite" in outcome.violations.pop("error", "")
        if not outcome.rejected:
            outcome.violations["not finite"] = "the Hessian has nan or inf, and there is a result"
    elif result is not None:
        outcome.converged = result.eigenvalues_converged
        check = _Check(case, problem, hessian, result, outcome)
        check.eigenvalues()
        check.smallest()
        check.traces()
        check.blocks()
        check.density()
    return outcome


def _result(
    problem: Problem, options: Mapping[str, Any], params: list[str] | None, outcome: Outcome
) -> SharpnessResult | None:
    before = copy.deepcopy(problem.batches)
    result = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with untouched(problem.model):
                result = sharpness(problem.model, problem.loss_fn, problem.batches, params=params, **options)
        except AssertionError as error:
            outcome.violations["model changed"] = str(error).splitlines()[0]
        except Exception as error:  # of any kind: it is written down
            outcome.rejected = HABITS[outcome.case.habit].changes and isinstance(error, ValueError)
            if not outcome.rejected:
                outcome.violations["error"] = f"{type(error).__name__}: {error}"
    outcome.warned = tuple(str(warning.message) for warning in caught)
    if not _is_same(problem.batches, before):
        outcome.violations["batches changed"] = "a batch is not what it was"
    return result


class _Check:
    """One result against the exact Hessian; adds to an outcome."""

    def __init__(
        self, case: Case, problem: Problem, hessian: Tensor, result: SharpnessResult, outcome: Outcome
    ) -> None:
        self.problem, self.hessian, self.result, self.outcome = problem, hessian, result, outcome
        self.values = torch.linalg.eigvalsh(hessian)
        self.scale = float(self.values.abs().max())
        self.rounding = _ROUNDING[case.dtype] * float(hessian.norm()) + 1e-9
        self.tolerance = float(case.options["tolerance"])
        heads = [path for path, module in problem.model.named_modules() if hasattr(module, "router")]
        self.head = heads[0] if heads else None
        self.random = torch.Generator().manual_seed(case.seed)

    def eigenvalues(self) -> None:
        """The k largest with their multiplicity, each within its certificate."""
        result = self.result
        if result.eigenvalues_converged:
            exact = self.values.flip(0)[: len(result.eigenvalues)].tolist()
            for place, (value, residual, right) in enumerate(
                zip(result.eigenvalues, result.residuals, exact, strict=True), start=1
            ):
                if not abs(value - right) <= residual * abs(value) + 1e-9:
                    others = (self.values - value).abs().min()
                    kind = "missing copy" if others <= residual * abs(value) + 1e-9 else "certificate"
                    self.add(
                        f"eigenvalue, {kind}",
                        f"λ{place} {value:.9g} ± {residual * abs(value):.1e}, exact {right:.9g} (off by "
                        f"{abs(value - right):.1e}; scale {self.scale:.2e})",
                    )
        for value, residual in zip(result.eigenvalues, result.residuals, strict=True):
            self.is_an_eigenvalue("eigenvalue, none there", value, residual, self.values)
        if result.eigenvectors is not None:
            vectors = result.eigenvectors.double()
            for value, residual, vector in zip(result.eigenvalues, result.residuals, vectors, strict=True):
                found = float((self.hessian @ vector - value * vector).norm())
                # the vector itself is rounded
                bound = residual * abs(value) + 1e-9 + 4 * torch.finfo(result.eigenvectors.dtype).eps * self.scale
                if not found <= bound:
                    self.add("residual", f"‖Hv - λv‖ is {found:.4e}, bound {bound:.4e} (λ {value:.6g})")

    def is_an_eigenvalue(self, kind: str, value: float, residual: float, values: Tensor) -> None:
        """A residual certifies that there is an eigenvalue, also where the iteration did not converge."""
        distance = float((values - value).abs().min())
        if not distance <= residual * abs(value) + 1e-9:
            self.add(kind, f"{value:.9g} ± {residual * abs(value):.1e}, the nearest is {distance:.1e} away")

    def smallest(self) -> None:
        """Not below the smallest eigenvalue by more than its residual."""
        bound = self.result.lambda_min_residual * abs(self.result.lambda_min) + 1e-9
        below = float(self.values[0]) - self.result.lambda_min
        if not below <= bound:
            self.add("lambda_min", f"{self.result.lambda_min:.6g} is {below:.1e} below the smallest, bound {bound:.1e}")

    def traces(self) -> None:
        """The trace, and those of the blocks, within six standard errors."""
        result = self.result
        self.outcome.trace_error = self.trace("trace", result.trace, result.trace_stderr, float(self.hessian.trace()))
        errors = []
        for name, block in {**result.blocks, **result.experts}.items():
            exact = float(self.hessian.diagonal()[self.places(name)].sum())
            errors.append(self.trace(f"trace of block {name}", block.trace, block.trace_stderr, exact))
        found = [error for error in errors if error is not None]
        if found:
            # one of them: what the blocks of a model share would count several times
            self.outcome.block_error = found[int(torch.randint(len(found), (), generator=self.random))]

    def trace(self, kind: str, value: float, stderr: float, exact: float) -> float | None:
        """The error in standard errors, None if it is rounding."""
        error = abs(value - exact)
        if not error <= 6 * stderr + self.rounding:
            self.add(kind.partition(" of ")[0], f"{kind} {value:.6g} ± {stderr:.2g}, exact {exact:.6g}")
        if not math.isfinite(stderr):
            return None
        return error / stderr if stderr > self.rounding else None

    def blocks(self) -> None:
        """The largest eigenvalue of each block, within its certificate."""
        for name, block in self.result.blocks.items():
            if block.lambda_max is None or block.lambda_max_residual is None:
                continue
            inside = self.places(name)
            values = torch.linalg.eigvalsh(self.hessian[inside][:, inside])
            self.is_an_eigenvalue("block eigenvalue", block.lambda_max, block.lambda_max_residual, values)
            bound = max(block.lambda_max_residual, self.tolerance) * abs(block.lambda_max) + self.rounding
            if block.lambda_max_residual <= self.tolerance and not float(values[-1]) - block.lambda_max <= bound:
                self.add("block eigenvalue, not the largest", f"{name}: {block.lambda_max:.6g}, exact {values[-1]:.6g}")

    def density(self) -> None:
        """The share of the grid that is right, where there is something."""
        density = self.result.density
        if density is None:
            return
        exact = _broadened(density, self.values)
        there = exact > 1e-3 * exact.max()
        error, stderr = (density.values - exact).abs()[there], density.stderr[there]
        if not bool(there.any()):
            self.add("density", "the grid misses the spectrum")
        elif bool((stderr > 0).any()):
            self.outcome.density_share = float((error <= 2 * stderr).double().mean())
        elif not float(error.max()) <= 0.01 * float(exact.max()):
            self.add("density", f"said to be exact, off by {float(error.max() / exact.max()):.1%} of its peak")

    def places(self, block: str) -> Tensor:
        """Places of the parameters of one of the default blocks, or of an expert, in the flat vector."""
        names, sizes = self.problem.names, [self._parameter(name).numel() for name in self.problem.names]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        kind, _, number = block.partition(" ")
        inside = torch.zeros(sum(sizes), dtype=torch.bool)
        for name, size, end in zip(names, sizes, ends, strict=True):
            place = slice(end - size, end)
            in_experts = "experts." in name and "shared" not in name
            if kind == "expert":
                # the weights are (E, ...), the biases flat
                part = size // self._parameter(name.replace(".bias", ".weight")).shape[0] if in_experts else 0
                inside[end - size + int(number) * part : end - size + (int(number) + 1) * part] = True
            elif self.head is not None:
                inside[place] = _block_of_head(self.head, name) == block
            else:
                inside[place] = name == block or name.startswith(f"{block}.")
        return inside

    def add(self, kind: str, text: str) -> None:
        """Note a violation; the first of its kind."""
        self.outcome.violations.setdefault(kind, text)

    def _parameter(self, name: str) -> Tensor:
        return dict(self.problem.exact_model.named_parameters())[name]


def _block_of_head(head: str, name: str) -> str:
    """The block of a parameter of a model with one of our heads, at a path."""
    prefix = f"{head}." if head else ""
    if not name.startswith(prefix):
        return "backbone"
    part = name.removeprefix(prefix).partition(".")[0]
    labels = {"router": "router", "experts": "experts", "shared": "shared experts"}
    return labels.get(part) or head.rpartition(".")[2] or "head"


def _broadened(density: SpectralDensity, values: Tensor) -> Tensor:
    distances = (density.grid[:, None] - values) / density.sigma
    return torch.exp(-distances.square() / 2).mean(1) / (density.sigma * math.sqrt(2 * math.pi))


def _is_same(batch: Any, other: Any) -> bool:
    """Whether two batches are the same, bit for bit, in the same containers."""
    if isinstance(batch, Tensor):
        return isinstance(other, Tensor) and batch.dtype == other.dtype and torch.equal(batch, other)
    if isinstance(batch, Mapping):
        return list(batch) == list(other) and all(_is_same(batch[name], other[name]) for name in batch)
    if dataclasses.is_dataclass(batch):
        return _is_same(vars(batch), vars(other))
    if isinstance(batch, (list, tuple)):
        return len(batch) == len(other) and all(map(_is_same, batch, other))
    return bool(batch == other)


class Tally:
    """Counts over many outcomes, and what has to be true of them."""

    def __init__(self) -> None:
        self.outcomes: dict[int, Outcome] = {}

    def add(self, outcome: Outcome) -> None:
        """One more outcome."""
        self.outcomes[outcome.case.seed] = outcome

    def report(self) -> str:
        """The counts as lines."""
        outcomes = list(self.outcomes.values())
        kinds = Counter(kind for outcome in outcomes for kind in outcome.violations)
        warned = Counter(text[:100] for outcome in outcomes for text in outcome.warned)
        lines = [
            f"{len(outcomes)} runs: {self.share(lambda o: o.converged):.1%} converged,"
            f" {sum(o.rejected for o in outcomes)} rejected,"
            f" {sum(bool(o.violations) for o in outcomes)} with a violation"
        ]
        lines += [f"  {count} {kind}" for kind, count in kinds.most_common()]
        for name, errors in (("trace", self.errors("trace_error")), ("block traces", self.errors("block_error"))):
            inside = sum(error <= 2 for error in errors)
            largest = max(errors, default=0.0)
            lines.append(
                f"{name}: {inside} of {len(errors)} within 2 standard errors ({inside / max(1, len(errors)):.1%}), at"
                f" least {least_inside(len(errors))} expected; largest error {largest:.1f}"
            )
        shares = self.errors("density_share")
        lines.append(
            f"density: {sum(shares) / max(1, len(shares)):.1%} of the grid within 2 errors, {len(shares)} runs"
        )
        lines += [f"warned {count} times: {text}" for text, count in warned.most_common(10)]
        return "\n".join(lines)

    def share(self, holds: Callable[[Outcome], bool]) -> float:
        """Share of the outcomes."""
        return sum(map(holds, self.outcomes.values())) / max(1, len(self.outcomes))

    def errors(self, name: str) -> list[float]:
        """The values of one field, where there are some."""
        # what a changed batch does to the numbers is seen from the violations
        counted = (o for o in self.outcomes.values() if not HABITS[o.case.habit].changes)
        found: Iterable[float | None] = (getattr(outcome, name) for outcome in counted)
        return [value for value in found if value is not None]


def least_inside(count: int) -> int:
    """Fewest of so many 95 % intervals that cover, unless something is wrong: the 0.1 % quantile."""
    return int(binom.ppf(1e-3, count, 0.95)) if count else 0

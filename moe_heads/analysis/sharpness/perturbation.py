"""Sharpness that rescaling of the weights does not change: rise of the loss under perturbations of the weights."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.arguments import check_arguments
from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.copies import on_copies
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.graph_on_demand import GraphOnDemand
from moe_heads.analysis._shared.mean_check import check_mean
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.scalar import checked_scalar
from moe_heads.analysis._shared.state import write_back
from moe_heads.analysis._shared.tables import markdown_table
from moe_heads.analysis.sharpness.hessian.parameters import Selection, selected_parameters
from moe_heads.checks import check_at_least, check_flags, check_option, check_positive

__all__ = ["Norm", "PerturbationSharpnessResult", "perturbation_sharpness"]

Norm = Literal["l2", "linf"]
"""Norm of the ball of the worst case."""

# By norm and ``adaptive``. The docstring of `perturbation_sharpness` gives the reasons.
_RADII = {("l2", True): 0.5, ("l2", False): 0.05, ("linf", True): 0.001, ("linf", False): 0.0005}
_AVERAGE_RADII = {True: 0.1, False: 0.01}

# Steps of the ascent in units of the radius. Twice the radius crosses the ball; longer steps found no larger loss.
_LARGEST_STEP, _SMALLEST_STEP = 2.0, 2.0**-10


@dataclass(frozen=True, kw_only=True)
class PerturbationSharpnessResult:
    r"""Rise of a mean loss under perturbations :math:`\delta = c \odot u` of the weights, with its uncertainty.

    All values but the radii and the counts are in units of the loss. A value that was not computed is nan.

    Attributes:
        average: :math:`E[L(w + \delta)] - L(w)` for u normal with standard deviation ``average_radius``.
        average_stderr: Its standard error over the draws; infinite for fewer than two.
        worst: Largest :math:`L(w + \delta) - L(w)` found with :math:`\|u\| \le` ``radius``. It is a lower bound of the
            maximum, attained by a measured perturbation, and at least 0, which :math:`\delta = 0` attains.
        sam: The same after the single step of sharpness-aware minimization; negative where the step is too long.
        gradient_norm: Slope of the loss along the steepest u, :math:`\|c \odot \nabla L\|_2` for l2,
            :math:`\|c \odot \nabla L\|_1` for linf. A linear loss would rise by ``radius`` times this slope.
        center_loss: Loss of the unperturbed model.
        average_radius: Standard deviation of each entry of u in the average case.
        radius: Radius of the ball of the worst case, in ``norm``.
        norm: Norm of u in the worst case.
        adaptive: Whether :math:`c = |w|`; otherwise c = 1.
        num_draws: Antithetic pairs in ``average``.
        num_evaluations: Evaluations of the loss over all samples, without a gradient.
        num_gradients: Evaluations of the loss and its gradient over all samples.
        num_nonfinite: Perturbed points whose loss is nan or inf. The values above include them, so an average or a
            worst case may be nan or inf. The ascent ends at such a point.
        num_samples: Samples of the loss.
        num_parameters: Perturbed parameters.
        num_fixed: Those of them that are zero and do not move when ``adaptive``; 0 otherwise.
        seed: Seed of the draws.
        partial: Why the analysis ended early; "" for a complete result.
    """

    average_radius: float
    radius: float
    norm: Norm
    adaptive: bool
    num_parameters: int
    num_fixed: int
    seed: int
    average: float = math.nan
    average_stderr: float = math.inf
    worst: float = math.nan
    sam: float = math.nan
    gradient_norm: float = math.nan
    center_loss: float = math.nan
    num_draws: int = 0
    num_evaluations: int = 0
    num_gradients: int = 0
    num_nonfinite: int = 0
    num_samples: int = 0
    partial: str = ""

    @property
    def average_curvature(self) -> float:
        r"""``2 · average / average_radius²``, which tends to the trace of CHC, C = diag(c), for a small radius."""
        return 2 * self.average / self.average_radius**2

    @property
    def worst_curvature(self) -> float:
        r"""``2 · worst / radius²``, which tends to a lower bound of the maximum of uᵀCHCu where the gradient vanishes.

        The maximum is over unit u in ``norm``. For l2 it is the largest eigenvalue of CHC, comparable with
        `average_curvature` whatever the two radii are. With a gradient the value grows as 1 / radius.
        """
        return 2 * self.worst / self.radius**2

    def metrics(self) -> dict[str, float]:
        """Return the finite numbers to log: average, average_stderr, worst, sam, curvatures, radii, counts."""
        names = (
            *("average", "average_stderr", "worst", "sam", "average_curvature", "worst_curvature", "gradient_norm"),
            *("center_loss", "average_radius", "radius", "num_draws", "num_evaluations", "num_gradients"),
            *("num_nonfinite", "num_samples"),
        )
        values = {name: float(getattr(self, name)) for name in names} | ({"partial": 1.0} if self.partial else {})
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def summary(self) -> str:
        """Return a Markdown table of the numbers, with a sentence for each limitation."""
        scale = r"\|w\|" if self.adaptive else "1"
        ball = f"{'‖u‖₂' if self.norm == 'l2' else '‖u‖∞'} ≤ {self.radius:g}"
        rows = [
            ("loss of the model", f"{self.center_loss:.5g}", ""),
            ("average case", f"{self.average:.5g} ± {self.average_stderr:.2g}", f"u ~ N(0, {self.average_radius:g}²)"),
            ("one SAM step", f"{self.sam:.5g}", ball),
            ("worst case found", f"{self.worst:.5g}", ball),
            ("steepest slope", f"{self.gradient_norm:.5g}", "per unit of u"),
            ("average curvature", f"{self.average_curvature:.5g}", "2 · average / radius²"),
            ("worst curvature", f"{self.worst_curvature:.5g}", "2 · worst / radius²"),
            ("evaluations", f"{self.num_evaluations} losses, {self.num_gradients} gradients", ""),
            ("samples", f"{self.num_samples}", ""),
            ("parameters", f"{self.num_parameters}", f"{self.num_fixed} fixed at zero" if self.adaptive else ""),
        ]
        table = markdown_table((f"rise of the loss at w + c ⊙ u, c = {scale}", "value", "where"), rows)
        notes = [f"**Partial**: {self.partial}."] if self.partial else []
        if math.isnan(self.sam) and self.num_gradients < 2:
            notes.append("The worst case was not computed.")
        if self.num_nonfinite:
            notes.append(f"At {self.num_nonfinite} perturbed points the loss is nan or inf.")
        return "\n\n".join([table, *notes])


def perturbation_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    *,
    radius: float | None = None,
    average_radius: float | None = None,
    adaptive: bool = True,
    norm: Norm = "l2",
    num_draws: int = 20,
    num_steps: int = 20,
    params: Selection | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    batch_size_fn: BatchSizeFn | None = None,
    batch_weight_fn: BatchWeightFn | None = None,
) -> PerturbationSharpnessResult:
    r"""Return the rise of a mean loss under perturbations of the weights: average case, one SAM step, worst case.

    With :math:`\delta = c \odot u`, :math:`c = |w|` entry by entry (adaptive) or 1,

    .. math::
        S_\text{avg} = E_{u \sim N(0, \sigma^2 I)}\, L(w + c \odot u) - L(w), \qquad
        S_\text{max} = \max_{\|u\| \le \rho} L(w + c \odot u) - L(w),

    :math:`L = \frac{1}{N} \sum_i \ell_i` over all samples of ``batches`` in evaluation mode, with fixed buffers.
    Unlike the Hessian, the adaptive values do not change when a layer before a ReLU is multiplied by a positive number
    and the next layer is divided by it: c is multiplied likewise, the gradient is divided, and all steps are taken in
    u. A weight that is exactly zero has c = 0 and does not move. Both values are taken at a finite distance. They
    include the jumps of the loss where the routing of a sparse head changes.

    **Convention of the radii.** Both are lengths of u, as the paper uses its single symbol: ``average_radius`` σ is the
    standard deviation of *each entry*, ``radius`` ρ the length of the *whole* u. So an average u is
    :math:`\sigma \sqrt{P}` long, but moves by σ along any one direction, the worst included. To second order, where
    the gradient vanishes, :math:`S_\text{avg} = \frac{\sigma^2}{2} \operatorname{tr}(CHC)` and, for l2,
    :math:`S_\text{max} = \frac{\rho^2}{2} \lambda_\max(CHC)`, C = diag(c). Divide by half the squared radius
    (``average_curvature``, ``worst_curvature``) to compare the two. At equal radii the average may exceed the worst
    case.

    The average is over antithetic pairs: the mean of :math:`L(w \pm \delta) - L(w)` is one draw, in which terms linear
    in δ cancel exactly. The worst case is sought by projected gradient ascent in u, steepest in its norm, from the SAM
    point :math:`u = \rho\, c \odot g / \|c \odot g\|_2` (linf: :math:`u = \rho \operatorname{sign}(c \odot g)`; a
    random one where the gradient g is zero). A step that does not raise the loss is undone and halved. The paper takes
    the worst case of each batch of 128 samples and averages; here all samples share one perturbation.

    The model is evaluated inside `analysis_mode` and left bit for bit as it was, also after an error. The analysis
    holds one copy of the parameters, and four more vectors of their size for the worst case.

    Args:
        model: The model.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch. Random torch numbers in it
            are the same at every point.
        batches: The data, all of it held on the device of the model. Batches are weighted by their samples.
        radius: ρ. The adaptive default is 0.5 for l2 (with which ASAM trains on CIFAR-10; it is in the paper's grids
            for both ResNet-18 and ViT) and 0.001 for linf (also in both grids). Otherwise it is, in units of the
            weights, 0.05 for l2 (with which SAM trains) and 0.0005 for linf (the paper's smallest for ResNet-18).
            Without ``adaptive`` no single radius suits all models.
        average_radius: σ. By default 0.1 if adaptive, a tenth of each weight, the smallest value in both of the paper's
            grids; otherwise 0.01, from its grid for ViT.
        adaptive: Whether c is the magnitude of each weight, as in ASAM; otherwise 1, as in SAM.
        norm: Norm of u in the worst case. l2, the norm of ASAM, is that of the curvature above. linf allows each weight
            the same relative change.
        num_draws: Pairs of the average case, two evaluations of the loss each; 20 as in the paper.
        num_steps: Maximum number of steps of the ascent after SAM's, one gradient each; 20 as in the paper. The ascent
            ends earlier when its steps become negligible. 0 leaves the SAM point.
        params: Parameters to perturb: tensors, or names of parameters or modules such as ``["head"]``; by default all
            that require a gradient.
        seed: Seed of the draws; equal seeds give equal results.
        progress: Shows the progress and ends the analysis at its time limit; see `Progress`.
        ranks: The processes that share the work, each with its part of the samples in ``batches``. All of them call
            this function and get the result. By default this process has all samples.
        batch_size_fn: ``batch_size_fn(batch)``, the number of samples of a batch; by default inferred from its tensors.
        batch_weight_fn: ``batch_weight_fn(batch)``, the weight of its loss; by default the number of samples.

    Returns:
        The values with their uncertainty. Values at perturbed points may be nan or inf, and are counted. When the time
        of the progress is over, the result holds the values so far and its ``partial`` gives the reason.

    Raises:
        ValueError: If an argument is out of range, the model has nothing to perturb, the data is empty, or the loss is
            not a scalar that depends on the parameters, or it or its gradient is not finite for the unperturbed model.

    Source:
        Andriushchenko, Croce, Müller, Hein and Flammarion, A modern look at the relationship between sharpness and
        generalization, 2023, arXiv 2302.07011 (definitions, ranges of the radii). Kwon et al., ASAM, 2021, arXiv
        2102.11600 (c = :math:`|w|`, the adaptive step). Foret et al., SAM, 2021, arXiv 2010.01412.

    Example:
        >>> import torch
        >>> from moe_heads.analysis import perturbation_sharpness
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> x = torch.ones(4, 1, dtype=torch.float64)
        >>> result = perturbation_sharpness(model, lambda m, batch: m(batch).square().mean(), [x], radius=0.5)
        >>> round(result.worst, 6)  # from 2² to 3²
        5.0
    """
    check_arguments(model=model, loss_fn=loss_fn, seed=seed, progress=progress, ranks=ranks)
    check_arguments(batch_size_fn=batch_size_fn, batch_weight_fn=batch_weight_fn)
    check_positive(or_none=True, radius=radius, average_radius=average_radius)
    check_flags(adaptive=adaptive)
    check_option("norm", norm, get_args(Norm))
    check_at_least(2, num_draws=num_draws)  # a standard error takes two draws
    check_at_least(0, num_steps=num_steps)
    chosen = selected_parameters(model, params)
    progress, ranks = progress or Progress(), ranks or Ranks()
    with ranks.synchronized():
        given = Batches.of(batches, batch_size_fn, batch_weight_fn)
    check_mean(model, loss_fn, given, progress=progress, ranks=ranks, seed=seed)
    with analysis_mode(model, seed):
        with ranks.synchronized():
            weights = _PerturbedWeights(chosen, adaptive)
            # Several ranks would diverge if each checked the time, so rank zero checks it between evaluations.
            data = Microbatches(given, weights.device, progress if ranks.size == 1 else Progress())
            losses = _PerturbedLosses(model, loss_fn, data, weights, seed)
        empty = PerturbationSharpnessResult(
            average_radius=_AVERAGE_RADII[adaptive] if average_radius is None else average_radius,
            radius=_RADII[norm, adaptive] if radius is None else radius,
            norm=norm,
            adaptive=adaptive,
            num_parameters=sum(weights.sizes),
            num_fixed=weights.num_fixed,
            seed=seed,
        )
        return _PerturbationAnalysis(empty, losses, ranks, progress, num_draws, num_steps).run()


class _PerturbedWeights:
    r"""The parameters at :math:`w + c \odot u`, moved in place; `analysis_mode` restores them."""

    def __init__(self, chosen: Mapping[str, Tensor], adaptive: bool) -> None:
        self.params = tuple(chosen.values())
        self.adaptive = adaptive
        self.dtype, self.device = self.params[0].dtype, self.params[0].device
        self.sizes = [p.numel() for p in self.params]
        self._starts = [p.detach().clone() for p in self.params]
        self.num_fixed = sum(int((start == 0).sum()) for start in self._starts) if adaptive else 0

    def move(self, parts: Iterable[Tensor], scale: float = 1.0) -> None:
        """Move to ``scale`` times u, given as one part for each parameter."""
        for parameter, start, part in zip(self.params, self._starts, parts, strict=True):
            change = part.to(parameter).view_as(parameter) * scale
            write_back(parameter, start + (change.mul_(start.abs()) if self.adaptive else change))

    def normal(self, seed: int) -> Iterator[Tensor]:
        """Yield the parts of a standard normal u, which a seed determines on every device and rank."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.params:
            yield torch.randn(parameter.shape, generator=generator, dtype=self.dtype).to(self.device)

    def parts(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Return views of a flat vector (P,), one for each parameter."""
        parts: tuple[Tensor, ...] = vector.split(self.sizes)
        return parts

    def scale_(self, parts: Iterable[Tensor]) -> None:
        """Multiply by c in place."""
        if self.adaptive:
            for part, start in zip(parts, self._starts, strict=True):
                part.mul_(start.abs().view(-1))

    def random_start(self, seed: int) -> Tensor:
        """Return a random u, (P,), which is zero for weights that cannot move."""
        u = torch.cat([part.view(-1) for part in self.normal(seed)])
        for part, start in zip(self.parts(u), self._starts, strict=True):
            part.mul_((start != 0).view(-1) if self.adaptive else 1)
        return u


class _PerturbedLosses:
    """This rank's part of the loss and of its gradient at perturbed weights."""

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, data: Microbatches, weights: _PerturbedWeights, seed: int
    ) -> None:
        self._model, self._loss_fn, self._data = model, on_copies(loss_fn), data
        self.weights, self._seed = weights, seed
        self._graph = GraphOnDemand()

    def at_draw(self, message: Tensor) -> Tensor:
        """Return the weighted sum of the losses, the sum of the weights and the number of samples, (3,).

        ``message`` holds the seed of u and the factor of u.
        """
        draw, scale = message.tolist()
        self.weights.move(self.weights.normal(int(draw)), scale)
        total = torch.tensor([0, 0, self._data.num_samples], dtype=torch.float64)
        losses = self._data.evaluate(lambda index, batch: self._value(index, batch, at_center=scale == 0), copies=False)
        for weight, loss in losses:
            total[:2] += torch.tensor([weight * loss, weight], dtype=torch.float64)
        return total.to(message.device)

    def at_point(self, u: Tensor) -> Tensor:
        """Return the weighted sums of the gradients by u and of the losses, and the sum of the weights, (P + 2,)."""
        at_center = not bool(u.any())
        self.weights.move(self.weights.parts(u))
        total = torch.zeros(len(u) + 2, dtype=torch.float64, device=u.device)
        parts = self.weights.parts(total[:-2])
        found = self._data.evaluate(lambda index, batch: self._gradient(index, batch, at_center), copies=False)
        for weight, (loss, gradient) in found:
            for part, by_parameter in zip(parts, gradient, strict=True):
                part.add_(by_parameter.reshape(-1), alpha=weight)
            total[-2:] += torch.tensor([weight * loss, weight], dtype=torch.float64, device=u.device)
        self.weights.scale_(parts)
        return total

    def _value(self, index: int, batch: Batch, at_center: bool) -> float:
        return self._graph(lambda: float(self._loss(index, batch, at_center).detach()), compares=at_center)

    def _gradient(self, index: int, batch: Batch, at_center: bool) -> tuple[float, tuple[Tensor, ...]]:
        loss = self._loss(index, batch, at_center)
        if not loss.requires_grad:
            raise ValueError(
                f"loss_fn: expected a loss that depends on the model's parameters, got one for batch {index} that does"
                " not. Compute it from the output of the model."
            )
        found = torch.autograd.grad(loss, self.weights.params, allow_unused=True, materialize_grads=True)
        # torch.nn.functional.embedding may give a sparse gradient
        gradient = tuple(part if part.layout == torch.strided else part.to_dense() for part in found)
        if at_center and not all(bool(part.isfinite().all()) for part in gradient):
            raise ValueError(f"loss_fn: expected a finite gradient, got nan or inf in that of batch {index}")
        return float(loss.detach()), gradient

    def _loss(self, index: int, batch: Batch, at_center: bool) -> Tensor:
        """Return the loss of a batch, which may be nan or inf away from the center."""
        torch.manual_seed(self._seed + self._data.origins[index])  # the same random numbers as in the Hessian
        loss = checked_scalar(self._loss_fn(self._model, batch), f"the mean loss of batch {index}")
        if at_center and not bool(loss.isfinite().all()):
            raise ValueError(
                f"loss_fn: expected a finite loss of the model as it is, got {loss.item()} as the loss of batch {index}"
            )
        return loss.reshape(())


@dataclass
class _Point:
    """Mean loss at u, with the steepest direction there (None where the gradient gives none) and its slope."""

    u: Tensor
    loss: float
    direction: Tensor | None
    slope: float


@dataclass
class _PerturbationAnalysis:
    """Average case and worst case, computed on rank zero, with the result so far."""

    result: PerturbationSharpnessResult
    losses: _PerturbedLosses
    ranks: Ranks
    progress: Progress
    num_draws: int
    num_steps: int

    def run(self) -> PerturbationSharpnessResult:
        run, size = self.ranks.run_with_sums, self.result.num_parameters
        message = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        found = run(self.losses.at_draw, partial(self._in_time, self._average_case), message, message.new_zeros(3))
        if found.partial:
            return found
        # Only the shape of these tensors counts, so they are views of one number.
        one = torch.zeros(1, dtype=torch.float64, device=self.losses.weights.device)
        in_time = partial(self._in_time, self._worst_case)
        return run(self.losses.at_point, in_time, one.expand(size), one.expand(size + 2))

    def _in_time(
        self, case: Callable[[Callable[[Tensor], Tensor]], None], total: Callable[[Tensor], Tensor]
    ) -> PerturbationSharpnessResult:
        try:
            case(total)
        except TimeUp as error:
            in_time: PerturbationSharpnessResult = self.progress.result_in_time(error)
            return in_time
        return self.result

    def _average_case(self, total: Callable[[Tensor], Tensor]) -> None:
        # below 2**52, because seeds travel between ranks as float64
        generator = torch.Generator().manual_seed(self.result.seed)
        draws = torch.randint(2**52, (self.num_draws,), generator=generator)
        center = self._loss_at(total, 0, 0.0)
        self._step(center_loss=center)
        rises = torch.zeros(0, dtype=torch.float64)
        for draw in draws.tolist():
            pair = [self._loss_at(total, draw, sign * self.result.average_radius) for sign in (1, -1)]
            rises = torch.cat([rises, rises.new_tensor([sum(pair) / 2 - center])])
            stderr = float(rises.std()) / math.sqrt(len(rises)) if len(rises) > 1 else math.inf
            self._step(average=float(rises.mean()), average_stderr=stderr, num_draws=len(rises))

    def _loss_at(self, total: Callable[[Tensor], Tensor], draw: int, scale: float) -> float:
        message = torch.tensor([draw, scale], dtype=torch.float64, device=self.ranks.device)
        loss, weight, num_samples = total(message).tolist()
        self._count(loss / weight, num_evaluations=self.result.num_evaluations + 1, num_samples=round(num_samples))
        return float(loss / weight)

    def _worst_case(self, total: Callable[[Tensor], Tensor]) -> None:
        """Take the SAM step, then projected steepest ascent. No accepted point is worse than the one before it."""
        radius, norm = self.result.radius, self.result.norm
        size, weights = self.result.num_parameters, self.losses.weights
        center = self._point_at(total, torch.zeros(size, dtype=weights.dtype, device=weights.device))
        self._step(gradient_norm=center.slope)
        first = center.direction
        if first is None:
            first, _ = _steepest(weights.random_start(self.result.seed), norm)
        # A model of zeros has no weight that can move.
        best = center if first is None else self._point_at(total, radius * first)
        self._step(sam=best.loss - center.loss, worst=_not_below_zero(best.loss - center.loss))
        step = _LARGEST_STEP
        for _ in range(self.num_steps):
            # After a loss that is not finite there is nothing larger to find, or no direction.
            if not math.isfinite(best.loss) or best.direction is None or step < _SMALLEST_STEP:
                return
            trial = self._point_at(total, _projected(best.u + step * radius * best.direction, radius, norm))
            if trial.loss > best.loss or math.isnan(trial.loss):
                best, step = trial, min(2 * step, _LARGEST_STEP)
            else:
                step /= 2
            self._step(worst=_not_below_zero(best.loss - center.loss))

    def _point_at(self, total: Callable[[Tensor], Tensor], u: Tensor) -> _Point:
        sums = total(u.double())
        loss = float(sums[-2] / sums[-1])
        self._count(loss, num_gradients=self.result.num_gradients + 1)
        direction, slope = _steepest(sums[:-2] / sums[-1], self.result.norm)
        return _Point(u, loss, None if direction is None else direction.to(self.losses.weights.dtype), slope)

    def _count(self, loss: float, **counts: Any) -> None:
        num_nonfinite = self.result.num_nonfinite + (not math.isfinite(loss))
        self.result = replace(self.result, num_nonfinite=num_nonfinite, **counts)

    def _step(self, **values: Any) -> None:
        """Add values to the result, and report one more step: the center, a pair of draws, or a gradient."""
        self.result = found = replace(self.result, **values)
        self.progress.keep(lambda reason: replace(self.result, partial=reason))
        done = min(found.num_evaluations, 1) + found.num_draws + found.num_gradients
        shown = {"average": found.average, "stderr": found.average_stderr, "worst": found.worst}
        known = {name: value for name, value in shown.items() if math.isfinite(value)}
        self.progress.step(done, 3 + self.num_draws + self.num_steps, **known)


def _steepest(gradient: Tensor, norm: Norm) -> tuple[Tensor | None, float]:
    """Return the u of unit norm along which the loss rises most, or None for a zero gradient, and the slope there."""
    slope = float(gradient.norm() if norm == "l2" else gradient.abs().sum())
    if slope == 0 or not math.isfinite(slope):
        return None, slope
    return (gradient / slope if norm == "l2" else gradient.sign()), slope


def _projected(u: Tensor, radius: float, norm: Norm) -> Tensor:
    """Return the nearest u in the ball."""
    if norm == "linf":
        return u.clamp(-radius, radius)
    length = float(u.norm())
    return u if length <= radius else u * (radius / length)


def _not_below_zero(rise: float) -> float:
    return rise if math.isnan(rise) else max(rise, 0.0)  # max() would lose a nan

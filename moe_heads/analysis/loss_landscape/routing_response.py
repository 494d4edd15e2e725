"""Response of the routing of a sparse head to a step of the parameters, and its effect on the loss."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.arguments import check_arguments
from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.environment import device_of
from moe_heads.analysis._shared.mean_check import check_mean
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.parameter_path import ParameterPath
from moe_heads.analysis._shared.progress import Progress, TimeUp
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.tables import markdown_table
from moe_heads.analysis.loss_landscape.directions import split_direction
from moe_heads.analysis.loss_landscape.evaluate import (
    NUM_SUMS,
    Point,
    PointEvaluator,
    can_hold_routing,
    sparse_routers,
)
from moe_heads.analysis.loss_landscape.grid import numbers_of

__all__ = ["RoutingResponse", "has_sparse_router", "routing_response"]


@dataclass(frozen=True)
class RoutingResponse:
    r"""Loss and routing at :math:`\theta + s d`, with free routing and with the routing of s = 0.

    Losses are in the unit of the loss, steps in the unit of the direction (a length, for a unit direction).

    Attributes:
        steps: s, the measured steps in the given order.
        losses_free: Mean loss over the samples at each step, with the choices made there. Values may be nan or inf.
        losses_fixed: Mean loss at each step with the choices of s = 0, or None if no sparse router ran.
        flips: Fraction of samples (0 to 1) whose set of chosen experts differs from that of s = 0, at each step, as the
            mean over the passes of sparse routers. None if no sparse router ran.
        center_loss: Loss at s = 0.
        num_samples: Number of samples.
        seed: Seed of the random number generators at every point.
        num_unmeasured: Number of steps that were not measured. Zero unless the result is partial.
        partial: Reason why the analysis ended early, or "".
    """

    steps: tuple[float, ...]
    losses_free: tuple[float, ...]
    losses_fixed: tuple[float, ...] | None
    flips: tuple[float, ...] | None
    center_loss: float
    num_samples: int
    seed: int
    num_unmeasured: int = 0
    partial: str = ""

    def curvature_free(self, step: float) -> float | None:
        r"""Return the second difference :math:`(L(s) + L(-s) - 2 L(0)) / s^2` of the loss with free routing.

        Where routing flips, it includes the jumps of the loss, whose part grows as 1 / s² as s shrinks.

        Args:
            step: s, of either sign, not zero.

        Returns:
            The second difference, nan or inf if a loss is. None unless both s and -s were measured.
        """
        return self._curvature(self.losses_free, step)

    def curvature_fixed(self, step: float) -> float | None:
        """Return the second difference at fixed routing, which tends to d·Hd of the Hessian as s tends to zero.

        It is also None if no sparse router ran. The curvature is then that of `curvature_free`.
        """
        return None if self.losses_fixed is None else self._curvature(self.losses_fixed, step)

    def metrics(self) -> dict[str, float]:
        """Return the finite values to log.

        They are center_loss, num_samples and, for each step s, flips_s, loss_free_s and loss_fixed_s. For each s > 0
        that was measured with both signs there are curvature_free_s and curvature_fixed_s.
        """
        values: dict[str, float | None] = {"center_loss": self.center_loss}
        by_step = {"flips": self.flips, "loss_free": self.losses_free, "loss_fixed": self.losses_fixed}
        for name, found in by_step.items():
            if found is not None:
                values |= {f"{name}_{step:g}": value for step, value in zip(self.steps, found, strict=True)}
        for step in self._two_sided:
            values[f"curvature_free_{step:g}"] = self.curvature_free(step)
            values[f"curvature_fixed_{step:g}"] = self.curvature_fixed(step)
        values["num_samples"] = float(self.num_samples)
        if self.partial:
            values["partial"] = 1.0
        return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}

    def summary(self) -> str:
        """Return Markdown tables of losses and second differences by step, with notes."""
        sparse = self.losses_fixed is not None and self.flips is not None
        header = ["step s", "loss", "rise"]
        rows = [
            [f"{s:g}", f"{loss:.6g}", self._rise(loss)] for s, loss in zip(self.steps, self.losses_free, strict=True)
        ]
        if self.losses_fixed is not None and self.flips is not None:
            header = [*header, "loss, routing of s = 0", "rise, routing of s = 0", "samples that flip"]
            for row, loss, flips in zip(rows, self.losses_fixed, self.flips, strict=True):
                row += [f"{loss:.6g}", self._rise(loss), f"{flips:.2%}"]
        order = sorted(range(len(rows)), key=lambda index: self.steps[index])
        table = markdown_table(header, [rows[index] for index in order])
        return "\n".join([table, *self._curvature_table(sparse), *(f"\n{note}" for note in self._notes())])

    def _rise(self, loss: float) -> str:
        return f"{loss - self.center_loss:+.3g}"

    def _curvature_table(self, sparse: bool) -> list[str]:
        if not self._two_sided:
            return []
        header = ["step s", "(L(s) + L(-s) - 2 L(0)) / s²", *(["at the routing of s = 0"] if sparse else [])]
        found = [(s, self.curvature_free(s), self.curvature_fixed(s)) for s in self._two_sided]
        rows = [[f"{s:g}", *(f"{value:.5g}" for value in values if value is not None)] for s, *values in found]
        return ["", markdown_table(header, rows)]

    def _notes(self) -> list[str]:
        notes = [f"{self.num_samples} samples. The loss at s = 0 is {self.center_loss:.6g}."]
        if self.partial:
            notes.append(f"**Partial**: {self.partial}. {self.num_unmeasured} steps are missing.")
        if self.flips is None:
            notes.append("No sparse router ran, so no choice can change.")
        elif any(self.flips):
            notes.append("The loss jumps where samples flip. The Hessian is that of the loss at fixed routing.")
        if not all(map(math.isfinite, (*self.losses_free, *(self.losses_fixed or ())))):
            notes.append("Some losses are nan or inf.")
        return notes

    @property
    def _two_sided(self) -> list[float]:
        """Positive steps that were measured with both signs, in ascending order."""
        return sorted(step for step in self.steps if step > 0 and self.curvature_free(step) is not None)

    def _curvature(self, losses: Sequence[float], step: float) -> float | None:
        ends = [loss for sign in (1, -1) if (loss := self._at(losses, sign * step)) is not None]
        return (ends[0] + ends[1] - 2 * self.center_loss) / step**2 if step and len(ends) == 2 else None

    def _at(self, losses: Sequence[float], step: float) -> float | None:
        # 1e-12: the two ends of a grid may differ by rounding
        return next((y for x, y in zip(self.steps, losses, strict=True) if math.isclose(x, step, rel_tol=1e-12)), None)


def has_sparse_router(model: nn.Module) -> bool:
    """Return whether ``model`` contains a router that chooses experts (``k`` is not None), so that choices can flip.

    Example:
        >>> from moe_heads import SoftMoE, SparseMoE
        >>> from moe_heads.analysis.loss_landscape.routing_response import has_sparse_router
        >>> has_sparse_router(SparseMoE(8, 3)), has_sparse_router(SoftMoE(8, 3))
        (True, False)
    """
    return bool(sparse_routers(model))


def routing_response(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    direction: Tensor,
    steps: Sequence[float] | Tensor,
    *,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    seed: int = 0,
    batch_size_fn: BatchSizeFn | None = None,
    batch_weight_fn: BatchWeightFn | None = None,
) -> RoutingResponse:
    r"""Measure the loss at :math:`\theta + s d` with free and with fixed routing, and the fraction of rerouted samples.

    With the choice :math:`I_i(\theta)` of the experts for sample i, in evaluation mode,

    .. math::
        L_\text{free}(s) &= \frac{1}{N} \sum_i \ell_i\big(\theta + s d, I_i(\theta + s d)\big), \\
        L_\text{fixed}(s) &= \frac{1}{N} \sum_i \ell_i\big(\theta + s d, I_i(\theta)\big), \\
        \text{flips}(s) &= \frac{1}{N} \sum_i 1\big[I_i(\theta + s d) \ne I_i(\theta)\big].

    The loss at free routing has jumps. The loss at fixed routing is as smooth as the model. At s = 0 the derivatives of
    both, including the Hessian, are those of the second. So a Hessian describes the loss up to the step at which the
    two diverge. At fixed routing the mixing weights follow the parameters (see `moe_heads.fixed_routing`).

    Losses and flips equal those of ``loss_landscape(direction1=direction, alphas=steps)``, except that the largest gate
    of a soft router does not count as a choice here. The steps can be in any order.

    The model is evaluated inside `analysis_mode` and left bit for bit as it was, also after an error. A loss that draws
    random torch numbers draws the same ones at every point. A step costs one forward pass, and a second one for the
    batches in which a choice changed.

    Args:
        model: The model :math:`\theta`.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch.
        batches: The data. All of it is held on the device of the model. Batches are weighted by their samples.
        direction: d, flat, (P,), over the parameters that require a gradient in the order of
            ``model.named_parameters()``. It is not normalized.
        steps: s, distinct, of any sign. With s and -s there are second differences. The smallest are measured first.
        progress: Shows the steps, the center first, and enforces the time limit, see `Progress`.
        ranks: The processes that share the work, each with its part of the samples in ``batches``. All of them call
            this function with the same direction and steps, and get the result. By default this process has all
            samples.
        seed: Seed of the random number generators at every point.
        batch_size_fn: ``batch_size_fn(batch)``, the number of samples of a batch. By default it is inferred from the
            tensors.
        batch_weight_fn: ``batch_weight_fn(batch)``, the weight of the loss of a batch, if it is not a mean over the
            samples. Defaults to the number of samples.

    Returns:
        Losses and flips of each step. Losses that are nan or inf are kept. Without a sparse router the losses at fixed
        routing and the flips are None. If the time limit ends the analysis, the result has the measured steps and is
        marked by ``partial``.

    Raises:
        ValueError: If the direction or the steps do not fit, the data is empty, the loss is not a scalar or not finite
            at the center, a router does not define `Router.rechosen`, or the routers get different rows at a step.

    Example:
        >>> import torch
        >>> from moe_heads import SparseMoE
        >>> from moe_heads.analysis import random_direction
        >>> from moe_heads.analysis import routing_response
        >>> head = SparseMoE(8, 3, num_experts=4, k=1)
        >>> batch = torch.randn(50, 8), torch.randint(3, (50,))
        >>> loss_fn = lambda m, batch: torch.nn.functional.cross_entropy(m(batch[0]), batch[1])
        >>> response = routing_response(head, loss_fn, [batch], random_direction(head), [-1.0, 1e-9, 1.0])
        >>> response.flips[0] > 0, response.flips[1]
        (True, 0.0)
        >>> response.losses_free[0] == response.losses_fixed[0], response.losses_free[1] == response.losses_fixed[1]
        (False, True)
    """
    check_arguments(model=model, loss_fn=loss_fn, seed=seed, progress=progress, ranks=ranks)
    check_arguments(batch_size_fn=batch_size_fn, batch_weight_fn=batch_weight_fn)
    parts = split_direction(model, direction)
    distinct_steps = _checked_steps(steps)
    if not can_hold_routing(model):
        raise ValueError(
            "model: expected sparse routers that define rechosen(routing, reference), got one without. Define it in"
            " the router class."
        )
    progress, ranks = progress or Progress(), ranks or Ranks()
    with ranks.synchronized():
        data = Batches.of(batches, batch_size_fn, batch_weight_fn)
    check_mean(model, loss_fn, data, progress=progress, ranks=ranks, seed=seed)
    with analysis_mode(model, seed) as original:
        with ranks.synchronized():
            microbatches = Microbatches(data, device_of(model), progress if ranks.is_rank_zero else Progress())
            evaluator = PointEvaluator(
                model,
                ParameterPath(model, [parts], original),
                loss_fn,
                None,
                microbatches,
                hold_routing=True,
                seed=seed,
                reuses_outputs=False,  # the first steps are the smallest, which would validate little
                counts_soft=False,
            )
        message = torch.zeros(1, dtype=torch.float64, device=ranks.device)
        return ranks.run_with_sums(
            lambda step: evaluator.evaluate(step.tolist()).to(ranks.device),
            lambda total: _measure(total, distinct_steps, message, progress, seed),
            message,
            message.new_zeros(NUM_SUMS),
        )


def _checked_steps(steps: Sequence[float] | Tensor) -> list[float]:
    given = numbers_of("steps", steps)
    numbers: list[float] = given.reshape(-1).tolist()
    is_distinct = len(set(numbers)) == len(numbers)
    if given.dim() != 1 or not numbers or not all(map(math.isfinite, numbers)) or not is_distinct:
        raise ValueError(f"steps: expected at least one number, finite and distinct, got {given.tolist()}.")
    return numbers


def _measure(
    total: Callable[[Tensor], Tensor], steps: list[float], message: Tensor, progress: Progress, seed: int
) -> RoutingResponse:
    """Measure the center, then the steps by increasing distance."""
    center = Point.of(total(message))
    found = {0.0: center} if 0 in steps else {}
    remaining = sorted(set(steps) - set(found), key=abs)
    is_routed = not math.isnan(center.flips)

    def result(partial: str = "") -> RoutingResponse:
        measured = [step for step in steps if step in found]
        points = [found[step] for step in measured]
        return RoutingResponse(
            steps=tuple(measured),
            losses_free=tuple(point.loss for point in points),
            losses_fixed=tuple(point.fixed for point in points) if is_routed else None,
            flips=tuple(point.flips for point in points) if is_routed else None,
            center_loss=center.loss,
            num_samples=center.num_samples,
            seed=seed,
            num_unmeasured=len(steps) - len(measured),
            partial=partial,
        )

    try:
        progress.step(1, 1 + len(remaining))
        for done, step in enumerate(remaining, start=2):
            found[step] = Point.of(total(torch.full_like(message, step)))
            progress.keep(result)
            progress.step(done, 1 + len(remaining))
    except TimeUp as error:
        in_time: RoutingResponse = progress.result_in_time(error)
        return in_time
    return result()

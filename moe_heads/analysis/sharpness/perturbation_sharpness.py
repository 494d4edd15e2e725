"""Sharpness that survives rescaling of the weights: rise of the loss under average and worst-case perturbations."""

from collections.abc import Iterable
from typing import get_args

from torch import nn

from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.batches import Batch, LossFn
from moe_heads.analysis._shared.counting import BatchSizeFn, BatchWeightFn
from moe_heads.analysis._shared.mean_check import check_mean
from moe_heads.analysis._shared.microbatches import Microbatches
from moe_heads.analysis._shared.preserve import analysis_mode
from moe_heads.analysis._shared.progress import Progress
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.sharpness.hessian.parameters import Selection, selected_parameters
from moe_heads.analysis.sharpness.perturbation.ascent import worst_case
from moe_heads.analysis.sharpness.perturbation.average import average_case
from moe_heads.analysis.sharpness.perturbation.findings import Findings
from moe_heads.analysis.sharpness.perturbation.losses import PerturbedLosses
from moe_heads.analysis.sharpness.perturbation.result import Norm, PerturbationSharpnessResult
from moe_heads.analysis.sharpness.perturbation.weights import PerturbedWeights
from moe_heads.checks import check_at_least, check_flags, check_option, check_positive, check_seed

__all__ = ["check_perturbation_options", "perturbation_sharpness"]

# By norm and whether adaptive; the reasons are in the docstring of `perturbation_sharpness`.
_RADII: dict[tuple[str, bool], float] = {
    ("l2", True): 0.5,
    ("l2", False): 0.05,
    ("linf", True): 0.001,
    ("linf", False): 0.0005,
}
_AVERAGE_RADII = {True: 0.1, False: 0.01}


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
    r"""Rise of a model's mean loss under perturbations of its weights: average case, one SAM step, worst case.

    With :math:`\delta = c \odot u`, :math:`c = |w|` entry by entry (adaptive) or 1,

    .. math::
        S_\text{avg} = E_{u \sim N(0, \sigma^2 I)}\, L(w + c \odot u) - L(w), \qquad
        S_\text{max} = \max_{\|u\| \le \rho} L(w + c \odot u) - L(w),

    :math:`L = \frac{1}{N} \sum_i \ell_i` over all samples of ``batches`` in evaluation mode; buffers do not move.
    Unlike the Hessian, the adaptive values do not change when a layer before a ReLU is multiplied by a positive number
    and the next one divided by it: c is multiplied likewise, the gradient divided, and everything here is done in u. A
    weight that is exactly zero has c = 0 and does not move. Both are values at a finite distance: where the routing of
    a sparse head changes on the way, the jump of the loss is in them.

    **Convention of the radii.** Both are lengths of u, in the paper's meaning of its one symbol: ``average_radius`` σ
    is the standard deviation of *each entry*, ``radius`` ρ the length of the *whole* u. So an average u is
    :math:`\sigma \sqrt{P}` long, but along any one direction, the worst included, it moves by σ. To second order, where
    the gradient vanishes, :math:`S_\text{avg} = \frac{\sigma^2}{2} \operatorname{tr}(CHC)` and, for l2,
    :math:`S_\text{max} = \frac{\rho^2}{2} \lambda_\max(CHC)`, C = diag(c): divide by half the squared radius
    (``average_curvature``, ``worst_curvature``) to compare the two. At equal radii the average is not bounded by the
    worst case.

    The average is over antithetic pairs: the mean of :math:`L(w \pm \delta) - L(w)` is one draw, so that what is linear
    in δ drops out exactly. The worst case is sought by projected gradient ascent in u, steepest in its norm, from the
    SAM point :math:`u = \rho\, c \odot g / \|c \odot g\|_2` (linf: :math:`u = \rho \operatorname{sign}(c \odot g)`;
    a random one where the gradient g is zero). A step that does not raise the loss is taken back and halved. The best
    point seen gives ``worst``, a lower bound of the maximum that some perturbation attains.

    The paper takes the worst case of each batch of 128 samples by itself and averages; here all samples share one
    perturbation.

    The model is evaluated inside `analysis_mode` and left bit for bit as it was, also after an error. Besides, one copy
    of the parameters is held, and four vectors of their size for the worst case.

    Args:
        model: The model.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean over the samples of the batch. Random torch numbers in it
            are the same at every point.
        batches: The data; all of it is held on the device of the model. Batches are weighted by their samples.
        radius: ρ. By default, adaptive, 0.5 for l2 (with which ASAM trains on CIFAR-10, and common to the paper's grids
            for ResNet-18 and ViT) and 0.001 for linf (common to both grids); else, in units of the weights, 0.05 for l2
            (with which SAM trains) and 0.0005 for linf (the paper's smallest for ResNet-18). Without ``adaptive`` no
            one radius suits all models.
        average_radius: σ. By default 0.1 when adaptive, a tenth of each weight, the smallest that is common to the
            paper's grids; else 0.01, from its grid for ViT.
        adaptive: Whether c is the magnitude of each weight, as in ASAM; else 1, as in SAM.
        norm: Norm of u in the worst case. l2, the norm of ASAM, is that of the curvature above; linf allows each weight
            the same relative change.
        num_draws: Pairs of the average case, two evaluations of the loss each; 20 as the paper has draws.
        num_steps: Most steps of the ascent after SAM's, one gradient each; 20 as in the paper. It ends before when its
            steps have become too small to matter. 0 leaves the SAM point.
        params: Parameters to perturb: tensors, or names of parameters or modules such as ``["head"]``; by default all
            that require a gradient.
        seed: Seed of the draws; equal seeds give equal results.
        progress: Shows the progress and ends the analysis when its time is over; see `Progress`.
        ranks: The processes that share the work, each with its part of the samples in ``batches``; all of them call
            this function and get the result. By default this process has all samples.
        batch_size_fn: ``batch_size_fn(batch)``, the number of samples of a batch; by default its tensors tell.
        batch_weight_fn: ``batch_weight_fn(batch)``, the weight of its loss, where that is no mean over the samples; by
            default the number of samples.

    Returns:
        The values with their uncertainty. A loss that is nan or inf at a perturbed point stays in them and is counted.
        When the time of the progress is over, what there is so far, marked by ``partial``.

    Raises:
        ValueError: If an argument is out of range, the model has nothing to perturb, the data is empty, or the loss is
            not a scalar that depends on the parameters, or it or its gradient is not finite for the model as it is.

    Source:
        Andriushchenko, Croce, Müller, Hein and Flammarion, A modern look at the relationship between sharpness and
        generalization, 2023, arXiv 2302.07011 (definitions, ranges of the radii). Kwon et al., ASAM, 2021, arXiv
        2102.11600 (c = :math:`|w|`, the adaptive step). Foret et al., SAM, 2021, arXiv 2010.01412.

    Example:
        >>> import torch
        >>> from moe_heads.analysis.sharpness.perturbation_sharpness import perturbation_sharpness
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> x = torch.ones(4, 1, dtype=torch.float64)
        >>> result = perturbation_sharpness(model, lambda m, batch: m(batch).square().mean(), [x], radius=0.5)
        >>> round(result.worst, 6)  # from 2² to 3²
        5.0
    """
    check_perturbation_options(radius, average_radius, adaptive, norm, num_draws, num_steps, seed)
    chosen = selected_parameters(model, params)
    progress, ranks = progress or Progress(), ranks or Ranks()
    with ranks.synchronized():
        given = Batches.of(batches, batch_size_fn, batch_weight_fn)
    check_mean(model, loss_fn, given, progress=progress, ranks=ranks, seed=seed)
    with analysis_mode(model, seed):
        with ranks.synchronized():
            weights = PerturbedWeights(chosen, adaptive)
            # with several processes a clock inside an evaluation would part their ways: rank zero looks between them
            data = Microbatches(given, weights.device, progress if ranks.size == 1 else Progress())
            losses = PerturbedLosses(model, loss_fn, data, weights, seed)
        findings = Findings(
            average_radius=_AVERAGE_RADII[adaptive] if average_radius is None else average_radius,
            radius=_RADII[norm, adaptive] if radius is None else radius,
            norm=norm,
            adaptive=adaptive,
            num_parameters=sum(weights.sizes),
            num_fixed=weights.num_fixed,
            seed=seed,
            num_draws=num_draws,
            num_steps=num_steps,
            progress=progress,
        )
        result = average_case(ranks, losses, findings)
        return result if result.partial else worst_case(ranks, losses, weights, findings)


def check_perturbation_options(
    radius: float | None,
    average_radius: float | None,
    adaptive: bool,
    norm: str,
    num_draws: int,
    num_steps: int,
    seed: int,
) -> None:
    """Refuse what no model could be analyzed with."""
    check_positive(or_none=True, radius=radius, average_radius=average_radius)
    check_flags(adaptive=adaptive)
    check_option("norm", norm, get_args(Norm))
    check_at_least(2, num_draws=num_draws)  # a standard error takes two draws
    check_at_least(0, num_steps=num_steps)
    check_seed(seed)

"""Average case: the mean rise of the loss over antithetic pairs of random perturbations."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moe_heads.analysis._shared.progress import TimeUp
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis.sharpness.perturbation.findings import Findings
from moe_heads.analysis.sharpness.perturbation.losses import PerturbedLosses
from moe_heads.analysis.sharpness.perturbation.result import PerturbationSharpnessResult

__all__ = ["average_case"]


def average_case(ranks: Ranks, losses: PerturbedLosses, findings: Findings) -> PerturbationSharpnessResult:
    """Fill in the center and the draws."""
    # seeds travel as float64
    draws = torch.randint(2**52, (findings.num_draws,), generator=torch.Generator().manual_seed(findings.seed))

    def algorithm(total: Callable[[Tensor], Tensor]) -> PerturbationSharpnessResult:
        def loss_at(draw: int, scale: float) -> float:
            message = torch.tensor([draw, scale], dtype=torch.float64, device=ranks.device)
            loss, weight, num_samples = total(message).tolist()
            findings.num_evaluations += 1
            findings.num_samples = round(num_samples)
            mean = loss / weight
            findings.num_nonfinite += not math.isfinite(mean)
            return float(mean)

        try:
            findings.center_loss = loss_at(0, 0.0)
            findings.step()
            for draw in draws.tolist():
                pair = [loss_at(draw, sign * findings.average_radius) for sign in (1, -1)]
                findings.rises.append(sum(pair) / 2 - findings.center_loss)
                findings.step()
        except TimeUp as error:
            in_time: PerturbationSharpnessResult = findings.progress.result_in_time(error)
            return in_time
        return findings.result()

    nothing = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    return ranks.run_with_sums(losses.at_draw, algorithm, nothing[:2], nothing)

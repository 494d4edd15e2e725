"""The trace of a small model that probes leave uncertain."""

from typing import Any

import pytest
import torch
from torch import nn

from moe_heads.analysis import SharpnessResult, sharpness
from tests.support.hessians import classification, cross_entropy, dense_hessian

# more than the parameters up to which a density takes all eigenvalues
PARAMETERS = 123


def result(**options: Any) -> tuple[SharpnessResult, float]:
    """Return the result, and the trace of the dense matrix in float64."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 3)), classification(32, 8)
    batch = batch[0].float(), batch[1]
    # a single batch needs 16 probes
    options = {"num_eigenvalues": 2, "trace_tolerance": 1e-3, "max_probes": 16} | options
    found = sharpness(model, cross_entropy, [batch], **options)
    assert found.num_parameters == PARAMETERS
    return found, float(dense_hessian(model.double(), cross_entropy, (batch[0].double(), batch[1])).trace())


def test_it_is_exact_within_the_steps_and_probes_that_are_allowed() -> None:
    found, expected = result()
    assert found.trace_converged and found.trace == pytest.approx(expected, rel=1e-5)
    assert abs(found.trace - expected) <= 3 * found.trace_stderr < 1e-4 * abs(expected)
    assert sum(block.trace for block in found.blocks.values()) == pytest.approx(found.trace, rel=1e-5)


@pytest.mark.parametrize("limit", [{"max_steps": PARAMETERS - 17}, {"basis_memory": 4 * PARAMETERS * (PARAMETERS - 1)}])
def test_limits_of_the_caller_are_kept(limit: dict[str, int]) -> None:
    found, _ = result(**limit)
    assert not found.trace_converged and found.num_products < PARAMETERS


def test_a_converged_trace_takes_no_further_product() -> None:
    found, _ = result(trace_tolerance=10.0)
    assert found.trace_converged and found.num_products < PARAMETERS

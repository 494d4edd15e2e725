import math

import torch

from moe_heads.analysis import sharpness
from moe_heads.commands.numbers import differ, errors_of


def test_numbers_differ_by_more_than_two_joint_errors() -> None:
    assert differ(1.0, 2.0, 0.3, 0.3)
    assert not differ(1.0, 2.0, 0.4, 0.4)
    assert differ(1.0, 1.0, 0.0, 0.0) is False
    assert differ(1.0, 2.0, None, 0.1) is None
    assert differ(1.0, 2.0, math.inf, 0.1) is None


def test_errors_of_a_sharpness() -> None:
    model = torch.nn.Linear(3, 2)
    batches = [(torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(5)]
    result = sharpness(model, lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1]), batches, num_eigenvalues=2)
    errors = errors_of(result)
    assert errors["lambda_2"] == result.residuals[1] * abs(result.eigenvalues[1])
    assert errors["lambda_max"] == math.hypot(
        result.residuals[0] * abs(result.eigenvalues[0]), result.lambda_max_sampling_stderr
    )
    assert errors["trace"] == math.hypot(result.trace_stderr, result.trace_sampling_stderr)
    assert set(errors) <= set(result.metrics())


def test_a_result_of_another_type_has_no_errors() -> None:
    assert errors_of(object()) == {}

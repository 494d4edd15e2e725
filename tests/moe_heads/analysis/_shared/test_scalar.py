"""Checks of scalar losses."""

import pytest
import torch

from moe_heads.analysis._shared.scalar import checked_scalar, is_scalar


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.ones(1), torch.ones(1, 1)])
def test_tensors_with_one_element_are_returned_unchanged(value: torch.Tensor) -> None:
    assert is_scalar(value)
    assert checked_scalar(value, "the mean loss") is value


@pytest.mark.parametrize(("value", "got"), [(torch.ones(2, 1), r"shape \(2, 1\)"), (1.0, "float"), (None, "NoneType")])
def test_other_values_raise_an_error_with_the_name_and_the_value(value: object, got: str) -> None:
    assert not is_scalar(value)
    with pytest.raises(ValueError, match=rf"accuracy_fn: expected a scalar tensor, the mean accuracy, got {got}\."):
        checked_scalar(value, "the mean accuracy", "accuracy_fn")

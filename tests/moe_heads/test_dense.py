"""Dense head."""

import pytest
import torch

from moe_heads import Dense


def test_equals_the_formula() -> None:
    head = Dense(4, 3, width=5, dropout=0.0).double()
    first, second = head.layers[0], head.layers[3]
    x = torch.randn(6, 4).double()
    expected = (x @ first.weight.T + first.bias).clamp_min(0) @ second.weight.T + second.bias
    torch.testing.assert_close(head(x), expected)


def test_tokens_are_averaged() -> None:
    head = Dense(4, 3, width=5).eval()
    x = torch.randn(2, 6, 4)
    torch.testing.assert_close(head(x), torch.stack([head(x[:, t]) for t in range(6)]).mean(0))


def test_output_has_the_same_three_fields_as_every_head() -> None:
    output = Dense(4, 3)(torch.randn(2, 4), return_routing=True)
    assert output._fields == ("logits", "aux_loss", "routing")
    assert output.aux_loss == 0
    assert output.routing is None


def test_dropout_zero_stays_zero() -> None:
    head = Dense(4, 3, dropout=0.0).train()
    x = torch.randn(2, 4)
    assert torch.equal(head(x), head(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width: expected an integer of at least 1, got 0"),
        ({"dropout": 1}, r"dropout: expected a number in \[0, 1\), got 1"),
        ({"in_features": 0}, "in_features: expected an integer of at least 1, got 0"),
        ({"num_classes": "10"}, "num_classes: expected an integer of at least 1, got '10'"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dense(**({"in_features": 4, "num_classes": 3} | options))

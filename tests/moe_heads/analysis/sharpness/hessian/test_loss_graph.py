import torch
from torch import nn

from moe_heads.analysis.sharpness.hessian.loss_graph import saved_bytes, second_order_errors


def test_saved_bytes_counts_each_storage_once_and_not_the_parameters() -> None:
    layer = nn.Linear(10, 10, bias=False)
    x = torch.randn(100, 10)

    # x is saved by the layer, its output once by sin and once by cos; the weight would be needed for the gradient of x.
    def compute() -> torch.Tensor:
        y = layer(x)
        return y.sin() + y.cos() + layer(y)

    assert saved_bytes(compute, excluded=layer.parameters()) == 2 * 100 * 10 * 4
    assert saved_bytes(compute, excluded=[]) == 2 * 100 * 10 * 4 + 10 * 10 * 4


def test_other_runtime_errors_pass_unchanged() -> None:
    error = RuntimeError("out of memory")
    try:
        with second_order_errors():
            raise error
    except RuntimeError as caught:
        assert caught is error

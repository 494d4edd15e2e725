"""Each rule on a small network: random permutations of the derived groups leave the loss unchanged."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_heads.analysis.weight_matching.function import match_weights
from moe_heads.analysis.weight_matching.tensors import tensors_of
from tests.support.matching import permute_randomly


class Net(nn.Module):
    """Layers and a function that calls them."""

    def __init__(self, call: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.call, self.layers = call, nn.ModuleList(layers)
        self.scale = nn.Parameter(torch.randn(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.call(x, *self.layers)
            if self.call.__code__.co_name != "scaled"
            else self.call(x, self.scale, *self.layers)
        )


def conv(inputs: int, outputs: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def scaled(x, scale, a, b):
    return b((a(x) * scale).relu().flatten(1))


# name: function, layers, number of units that can move
NETS = {
    "flatten": (lambda x, a, b: b(a(x).relu().flatten(1)), (conv(2, 6), nn.Linear(96, 3)), 6),
    "batch norm": (
        lambda x, a, n, b: b(F.gelu(n(a(x))).mean((2, 3))),
        (conv(2, 6), nn.BatchNorm2d(6), nn.Linear(6, 3)),
        6,
    ),
    "layer norm": (
        lambda x, a, n, b: b(torch.tanh(n(a(x.flatten(1))))),
        (nn.Linear(32, 6), nn.LayerNorm(6), nn.Linear(6, 3)),
        6,
    ),
    "depthwise": (
        lambda x, a, d, b: b(F.max_pool2d(d(a(x)).relu(), 2).flatten(1)),
        (conv(2, 6), conv(6, 6, groups=6), nn.Linear(24, 3)),
        6,
    ),
    "grouped": (
        lambda x, a, d, b: b(d(a(x)).relu().mean((2, 3))),
        (conv(2, 6), conv(6, 6, groups=2), nn.Linear(6, 3)),
        0,
    ),
    "residual": (
        lambda x, a, r, b: b((lambda h: h + r(h).relu())(a(x)).amax((2, 3))),
        (conv(2, 6), conv(6, 6), nn.Linear(6, 3)),
        6,
    ),
    "concatenation": (
        lambda x, a, c, b: b(torch.cat([a(x), c(a(x).relu())], 1).mean((2, 3))),
        (conv(2, 6), conv(6, 5), nn.Linear(11, 3)),
        11,
    ),
    "padding": (
        lambda x, a, c, b: b(F.relu(c(a(x)) + F.pad(a(x), (0, 0, 0, 0, 1, 2))).mean((2, 3))),
        (conv(2, 4), conv(4, 7), nn.Linear(7, 3)),
        7,
    ),
    "scale": (scaled, (conv(2, 6), nn.Linear(96, 3)), 6),
    "prelu": (lambda x, a, p, b: b(p(a(x)).flatten(1)), (conv(2, 6), nn.PReLU(6), nn.Linear(96, 3)), 6),
    "gated": (
        lambda x, a, b: b((lambda u, v: u * v.sigmoid())(a(x.flatten(1))[:, :5], a(x.flatten(1))[:, 5:])),
        (nn.Linear(32, 10), nn.Linear(5, 3)),
        5,
    ),
    "permute": (
        lambda x, a, b, c: c(b(a(x).permute(0, 2, 3, 1)).relu().mean((1, 2))),
        (conv(2, 6), nn.Linear(6, 5), nn.Linear(5, 3)),
        11,
    ),
    "tied": (
        lambda x, a, r, b: b(torch.tanh(r(torch.tanh(r(a(x.flatten(1))))))),
        (nn.Linear(32, 6), nn.Linear(6, 6), nn.Linear(6, 3)),
        6,
    ),
    "unknown": (lambda x, a, b: b(a(x).flip(1).relu().flatten(1)), (conv(2, 6), nn.Linear(96, 3)), 0),
}


@pytest.mark.parametrize("name", NETS)
def test_derived_permutations_leave_the_loss_unchanged(name: str) -> None:
    call, layers, size = NETS[name]
    model = Net(call, *layers).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    batch = torch.randn(8, 2, 4, 4, dtype=torch.float64), torch.randint(3, (8,))

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    before = float(loss_fn(model, batch).detach())
    permuted = permute_randomly(model, loss_fn, batch, seed=1)
    match = match_weights(model, permuted, loss_fn, batch)
    assert not match.failed
    assert sum(number for _, number in match.moved.values()) == size
    assert match.distance_after == 0 or name == "tied"  # a weight with one group on both sides is a harder problem
    assert (match.distance_before > 0) == (size > 0)
    original = tensors_of(model)
    model.load_state_dict(permuted)
    assert float(loss_fn(model, batch).detach()) == pytest.approx(before, rel=1e-12)
    assert any(not torch.equal(permuted[key], original[key]) for key in original) == (size > 0)

"""Networks of the oracle on vectors, by name: makers for a number of outputs."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from moe_heads import Dense, SoftMoE, SparseMoE
from tests.support.oracle_layers import FEATURES, Apply, Residual, flat, tanh_mlp, with_statistics

__all__ = ["FLAT_NETWORKS", "Features"]


def _mlp(width: int, activation: nn.Module, second: int | None = None) -> Callable[[int], nn.Module]:
    return lambda c: nn.Sequential(*flat(width, activation, second), nn.Linear(second or width, c))


class _Quadratic(nn.Module):
    """A bilinear form of the features with themselves."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.form, self.linear = nn.Bilinear(FEATURES, FEATURES, outputs), nn.Linear(FEATURES, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, x) / 2 + self.linear(x)


class _Tied(nn.Module):
    """An autoencoder whose decoder is the transposed encoder, with a readout."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, FEATURES) / 2)
        self.bias, self.back = nn.Parameter(torch.randn(8) / 2), nn.Parameter(torch.zeros(FEATURES))
        self.readout = nn.Linear(FEATURES, outputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(F.linear(x, self.weight, self.bias))
        return self.readout(torch.tanh(F.linear(hidden, self.weight.T, self.back)))


class _Shared(nn.Module):
    """One layer that is called three times, and known under two names."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, 8), nn.Linear(8, outputs)
        self.again = self.layer

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.again(F.silu(self.layer(x)))))


class _Frozen(nn.Module):
    """A body that is not trained, half a layer that is, and a head."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh()).requires_grad_(False)
        self.middle, self.head = nn.Linear(8, 10), nn.Linear(10, outputs)
        self.middle.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.body(x))))


class Features(nn.Module):
    """Random features and a linear readout: under a sum over outputs each eigenvalue is there once an output."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 28), nn.Tanh()).requires_grad_(False)
        self.readout = nn.Linear(28, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.body(x))


class _Routed(nn.Module):
    """Each sample to the expert of the sign of its first feature; an expert that no sample goes to is not called."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.body = nn.Linear(FEATURES, 5)
        self.experts = nn.ModuleList(_mlp(6, nn.Tanh())(outputs) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden, chosen = torch.tanh(self.body(x)), (x[:, 0] > 0.5).long()
        out = x.new_zeros(len(x), self.outputs)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(hidden[rows]))
        return out


class _Unused(nn.Module):
    """Parameters that no output depends on, before and after those that count."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.idle, self.used = nn.Linear(FEATURES, 9), tanh_mlp(outputs)
        self.spare = nn.Parameter(torch.randn(20))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class _Buffers(nn.Module):
    """Inputs standardized by buffers, one of them whole numbers, and a state that a call replaces."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(FEATURES))
        self.register_buffer("scale", torch.rand(FEATURES) + 0.5)
        self.register_buffer("order", torch.randperm(FEATURES))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.net, self.last = tanh_mlp(outputs), None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach().mean()
        return self.net(((x - self.mean) / self.scale)[:, self.order])


class _Checkpointed(nn.Module):
    """Two blocks that are computed again in the backward pass."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(FEATURES, 10), nn.Tanh())
        self.second, self.head = nn.Sequential(nn.Linear(10, 8), nn.SiLU()), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.first, x, use_reentrant=False)
        return self.head(checkpoint(self.second, hidden, use_reentrant=False))


class _Exponential(nn.Module):
    """A parametrization: positive weights."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.exp() / 3


class _Symmetric(nn.Module):
    """A parametrization: a symmetric matrix."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def _parametrized(outputs: int) -> nn.Module:
    positive, symmetric = nn.Linear(FEATURES, 8), nn.Linear(8, 8)
    parametrize.register_parametrization(positive, "weight", _Exponential())
    parametrize.register_parametrization(symmetric, "weight", _Symmetric())
    return nn.Sequential(positive, nn.Tanh(), symmetric, nn.Tanh(), nn.Linear(8, outputs))


class _Directions(nn.Module):
    """A parametrization: lengths and directions of the rows (torch's own weight norm has a wrong second derivative)."""

    def forward(self, length: Tensor, weight: Tensor) -> Tensor:
        return length * weight / weight.norm(dim=1, keepdim=True)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.norm(dim=1, keepdim=True), weight


def _weight_norm(outputs: int) -> nn.Module:
    layers = [nn.Linear(FEATURES, 10), nn.Linear(10, outputs)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", _Directions())
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def _spectral_norm(outputs: int) -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(FEATURES, 10)), nn.Softplus(), nn.Linear(10, outputs))


class _Gated(nn.Module):
    """Three experts, weighted by a softmax gate."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.gate = nn.Linear(FEATURES, 3)
        self.experts = nn.ModuleList(_mlp(4, nn.Tanh())(outputs) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(-1)
        return torch.stack([expert(x) for expert in self.experts], -1).mul(gates[:, None]).sum(-1)


class _Scalars(nn.Module):
    """Parameters without a dimension, and lists and dictionaries of parameters."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(0.1))
        self.temperature = nn.Parameter(torch.ones(1))
        self.weights = nn.ParameterList([torch.randn(FEATURES, 7) / 2, torch.randn(7, outputs) / 2])
        self.biases = nn.ParameterDict({"hidden": torch.zeros(7), "out": torch.zeros(outputs)})

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.scale * (x @ self.weights[0]) + self.biases["hidden"])
        return (hidden @ self.weights[1] + self.biases["out"]) / self.temperature + self.shift


class _Radial(nn.Module):
    """Gaussian bumps around centers, each with a width of its own."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.centers, self.widths = nn.Parameter(torch.randn(12, FEATURES)), nn.Parameter(torch.zeros(12))
        self.readout = nn.Linear(12, outputs)

    def forward(self, x: Tensor) -> Tensor:
        distances = (x[:, None] - self.centers).square().sum(-1)
        return self.readout(torch.exp(-distances * self.widths.exp() / 8))


class _Highway(nn.Module):
    """A carry gate between a layer and the identity."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.first, self.gate, self.layer = nn.Linear(FEATURES, 7), nn.Linear(7, 7), nn.Linear(7, 7)
        self.last = nn.Linear(7, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        gate = torch.sigmoid(self.gate(x))
        return self.last(gate * torch.tanh(self.layer(x)) + (1 - gate) * x)


class _Factorization(nn.Module):
    """A factorization machine: pairwise products of features."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.factors, self.linear = nn.Parameter(torch.randn(outputs, FEATURES, 8) / 3), nn.Linear(FEATURES, outputs)

    def forward(self, x: Tensor) -> Tensor:
        squared = torch.einsum("nf,cfr->ncr", x, self.factors).square()
        return self.linear(x) + (squared - torch.einsum("nf,cfr->ncr", x.square(), self.factors.square())).sum(-1) / 2


class _Hyper(nn.Module):
    """A network that makes the weights of another one from each sample."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.maker = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, FEATURES * outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nf,ncf->nc", x, self.maker(x).view(-1, self.outputs, FEATURES))


class _FixedPoint(nn.Module):
    """An implicit layer, unrolled for six steps."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.inner, self.input, self.readout = nn.Linear(8, 8), nn.Linear(FEATURES, 8), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        driven = self.input(x)
        state = torch.zeros_like(driven)
        for _ in range(6):
            state = torch.tanh(self.inner(state) + driven)
        return self.readout(state)


class _Normalized(nn.Module):
    """Cosine similarity with class vectors at a learned temperature."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body, self.classes = nn.Linear(FEATURES, 9), nn.Parameter(torch.randn(outputs, 9))
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        features = F.normalize(torch.tanh(self.body(x)), dim=-1)
        return self.log_scale.exp() * features @ F.normalize(self.classes, dim=-1).T


class _Swish(torch.autograd.Function):
    """A function with a backward pass of its own, which torch can differentiate again."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return grad * gate * (1 + x * (1 - gate))


def _zero_last_layer(outputs: int) -> nn.Module:
    model = nn.Sequential(*flat(10, nn.Tanh(), 6), nn.Linear(6, outputs))
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    return model


def _batch_normalized(outputs: int) -> nn.Module:
    layers = [nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8, bias=False)]
    layers += [nn.BatchNorm1d(8, affine=False), nn.SiLU(), nn.Linear(8, outputs)]
    return with_statistics(nn.Sequential(*layers), torch.randn(20, FEATURES))


def _shifted_softmax(outputs: int) -> nn.Module:
    """Detaches what cancels: a right gradient all the same."""
    return nn.Sequential(*flat(9, nn.Tanh(), 7), nn.Linear(7, outputs), Apply(lambda z: z - 0 * z.detach().amax()))


FLAT_NETWORKS: Mapping[str, Callable[[int], nn.Module]] = {
    "tanh": tanh_mlp,
    "relu": _mlp(12, nn.ReLU(), 8),
    "leaky relu": _mlp(14, nn.LeakyReLU(0.2)),
    "gelu": _mlp(12, nn.GELU(), 6),
    "softplus": _mlp(16, nn.Softplus()),
    "silu": _mlp(10, nn.SiLU(), 10),
    "elu": _mlp(18, nn.ELU()),
    "prelu": lambda c: nn.Sequential(nn.Linear(FEATURES, 12), nn.PReLU(12), nn.Linear(12, c)),
    "sine": lambda c: nn.Sequential(nn.Linear(FEATURES, 14), Apply(torch.sin), nn.Linear(14, c)),
    "swish of its own": lambda c: nn.Sequential(nn.Linear(FEATURES, 14), Apply(_Swish.apply), nn.Linear(14, c)),
    "cubic": lambda c: nn.Sequential(nn.Linear(FEATURES, 8), Apply(lambda z: z**3 / 6), nn.Linear(8, c)),
    "linear": lambda c: nn.Linear(FEATURES, c),
    "linear without bias": lambda c: nn.Linear(FEATURES, c, bias=False),
    "deep linear": lambda c: nn.Sequential(nn.Linear(FEATURES, 7), nn.Linear(7, 7), nn.Linear(7, c)),
    "quadratic": _Quadratic,
    "residual": lambda c: nn.Sequential(
        nn.Linear(FEATURES, 6), *(Residual(nn.Tanh(), nn.Linear(6, 6)) for _ in range(3)), nn.Linear(6, c)
    ),
    "layer norm": lambda c: nn.Sequential(nn.Linear(FEATURES, 10), nn.LayerNorm(10), nn.GELU(), nn.Linear(10, c)),
    "rms norm": lambda c: nn.Sequential(nn.Linear(FEATURES, 10), nn.RMSNorm(10), nn.SiLU(), nn.Linear(10, c)),
    "batch norm of vectors": _batch_normalized,
    "gated linear unit": lambda c: nn.Sequential(nn.Linear(FEATURES, 16), nn.GLU(), nn.Linear(8, c)),
    "dropout": lambda c: nn.Sequential(
        *flat(10, nn.Tanh()), nn.Dropout(0.5), nn.Linear(10, 6), nn.SiLU(), nn.Linear(6, c)
    ),
    "zero last layer": _zero_last_layer,
    "tied weights": _Tied,
    "shared layer": _Shared,
    "frozen body": _Frozen,
    "unused parameters": _Unused,
    "routed rows": _Routed,
    "buffers": _Buffers,
    "checkpointed": _Checkpointed,
    "weight norm": _weight_norm,
    "spectral norm": _spectral_norm,
    "parametrized": _parametrized,
    "softmax gate": _Gated,
    "scalar parameters": _Scalars,
    "radial": _Radial,
    "highway": _Highway,
    "factorization machine": _Factorization,
    "hypernetwork": _Hyper,
    "fixed point": _FixedPoint,
    "cosine classifier": _Normalized,
    "detached zero": _shifted_softmax,
    "dense head": lambda c: Dense(FEATURES, c, width=16),
    "soft head": lambda c: SoftMoE(FEATURES, c, num_experts=3, expert_width=4),
    "soft head of two slots": lambda c: SoftMoE(FEATURES, c, num_experts=2, expert_width=5, slots_per_expert=2),
    "sparse head, k = 1": lambda c: SparseMoE(FEATURES, c, num_experts=3, expert_width=4, k=1),
    "sparse head, k = 2": lambda c: nn.Sequential(
        nn.Linear(FEATURES, 5), nn.Tanh(), SparseMoE(5, c, num_experts=3, expert_width=4, k=2, num_shared_experts=1)
    ),
}

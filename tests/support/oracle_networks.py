"""Small networks of many kinds, for the comparison of sharpness with dense Hessians.

Shapes: N samples, C outputs. Every network maps its inputs, a tensor (N, ...) or two, to outputs (N, C).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.support.oracle_layers import FEATURES, flat, tanh_mlp
from tests.support.oracle_networks_flat import FLAT_NETWORKS, Features
from tests.support.oracle_networks_images import IMAGE_NETWORKS
from tests.support.oracle_networks_sequences import SEQUENCE_NETWORKS

__all__ = ["NETWORKS", "Network"]

Inputs = Callable[[int], dict[str, Tensor]]


@dataclass(frozen=True)
class Network:
    """A network and what it is fed.

    Attributes:
        name: Name of the kind.
        build: Makes it, in float32, for C outputs.
        inputs: Makes N samples: "x" and for some networks "mask", float64 or int64.
        outputs: Numbers of outputs C that it can have.
    """

    name: str
    build: Callable[[int], nn.Module]
    inputs: Inputs
    outputs: tuple[int, ...] = (1, 2, 3)


def _vectors(n: int) -> dict[str, Tensor]:
    return {"x": torch.randn(n, FEATURES, dtype=torch.float64)}


def _badly_scaled(n: int) -> dict[str, Tensor]:
    x = torch.randn(n, FEATURES, dtype=torch.float64)
    x[:, 0] *= 1e3
    return {"x": x}


def _images(n: int) -> dict[str, Tensor]:
    return {"x": torch.randn(n, 1, 6, 6, dtype=torch.float64)}


def _signals(n: int) -> dict[str, Tensor]:
    return {"x": torch.randn(n, 2, 7, dtype=torch.float64)}


def _tokens(n: int) -> dict[str, Tensor]:
    return {"x": torch.randint(0, 8, (n, 5))}


def _steps(n: int) -> dict[str, Tensor]:
    return {"x": torch.randn(n, 4, 3, dtype=torch.float64)}


def _masked_steps(n: int) -> dict[str, Tensor]:
    mask = torch.arange(4) >= torch.randint(1, 5, (n, 1))  # True where there is padding, as torch has it
    return {"x": torch.randn(n, 4, 4, dtype=torch.float64), "mask": mask}


def _wide_steps(n: int) -> dict[str, Tensor]:
    return {"x": torch.randn(n, 3, 4, dtype=torch.float64)}


_INPUTS: Mapping[str, Inputs] = {
    "vectors": _vectors,
    "badly scaled vectors": _badly_scaled,
    "images": _images,
    "signals": _signals,
    "tokens": _tokens,
    "steps": _steps,
    "wide steps": _wide_steps,
    "masked steps": _masked_steps,
}

NETWORKS: tuple[Network, ...] = (
    *(Network(name, build, _INPUTS["vectors"]) for name, build in FLAT_NETWORKS.items()),
    *(Network(name, build, _INPUTS[kind]) for name, (build, kind) in IMAGE_NETWORKS.items()),
    *(Network(name, build, _INPUTS[kind]) for name, (build, kind) in SEQUENCE_NETWORKS.items()),
    Network("badly scaled inputs", tanh_mlp, _INPUTS["badly scaled vectors"]),
    Network("badly scaled inputs, linear", lambda c: nn.Linear(FEATURES, c), _INPUTS["badly scaled vectors"]),
    Network("scalar regression", lambda c: nn.Sequential(*flat(9, nn.Softplus(), 9), nn.Linear(9, c)), _vectors, (1,)),
    Network("many outputs", lambda c: nn.Linear(FEATURES, c), _vectors, (8,)),
    Network("random features", Features, _vectors, (4, 6)),
    Network("many outputs, deep", tanh_mlp, _vectors, (12,)),
)

"""Batches of the oracle: one set of fields in many containers, and many ways to cut samples into batches."""

import random
from collections import UserDict, namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["CONTAINERS", "CUTS", "Container", "Fields", "batches_of"]

Fields = Mapping[str, Tensor]
"""Tensors (N, ...) by name, the inputs first, then "y" and "w", the targets and the weights of the samples."""


@dataclass(frozen=True)
class Container:
    """A way to hold fields.

    Attributes:
        name: Name of the kind.
        pack: The batch of some fields.
        unpack: The fields of a batch; the second argument has their names, shapes and data types.
        pop: Takes "y" out of the batch and returns it; None where that is not possible.
        put: Puts another "x" into the batch; None where that is not possible.
    """

    name: str
    pack: Callable[[Fields], Any]
    unpack: Callable[[Any, Fields], dict[str, Tensor]]
    pop: Callable[[Any, Fields], Tensor] | None = None
    put: Callable[[Any, Tensor], None] | None = None


class Encoding(UserDict[str, Tensor]):
    """A mapping whose entries are attributes as well, such as tokenizers return."""

    def __getattr__(self, name: str) -> Tensor:
        if name == "data" or name not in self.data:  # a copy asks before there is any data
            raise AttributeError(name)
        return self.data[name]


@dataclass
class Sample:
    """A batch that is a dataclass, with a name for each sample."""

    x: Tensor
    y: Tensor
    mask: Tensor | None = None
    w: Tensor | None = None
    names: tuple[str, ...] = ()


Masked = namedtuple("Masked", ["x", "y", "mask", "w"], defaults=[None, None])


def _by_attribute(batch: Any, like: Fields) -> dict[str, Tensor]:
    return {name: getattr(batch, name) for name in like}


def _listed(batch: Any, like: Fields) -> dict[str, Tensor]:
    return dict(zip(like, batch, strict=True))


def _set_item(batch: Any, x: Tensor) -> None:
    batch["x"] = x


def _set_first(batch: Any, x: Tensor) -> None:
    batch[0] = x


def _set_attribute(batch: Any, x: Tensor) -> None:
    batch.x = x


def _set_nested(batch: Any, x: Tensor) -> None:
    batch["inputs"]["x"] = x


def _as_dataclass(fields: Fields) -> Sample:
    return Sample(**fields, names=tuple(f"sample {i}" for i in range(len(fields["x"]))))


def _nested(fields: Fields) -> dict[str, Any]:
    targets = {name: value for name, value in fields.items() if name in {"y", "w"}}
    return {"inputs": {name: value for name, value in fields.items() if name not in targets}, "targets": [targets]}


def _from_nested(batch: Any, like: Fields) -> dict[str, Tensor]:
    return {**batch["inputs"], **batch["targets"][0]}


def _one_tensor(fields: Fields) -> Tensor:
    dtype = next((value.dtype for value in fields.values() if value.is_floating_point()), torch.float64)
    return torch.cat(
        [value.flatten(1).to(dtype) if value.dim() > 1 else value[:, None].to(dtype) for value in fields.values()], 1
    )


def _from_one_tensor(batch: Tensor, like: Fields) -> dict[str, Tensor]:
    widths = [value[0].numel() for value in like.values()]
    parts = zip(like.items(), batch.split(widths, 1), strict=True)
    return {
        name: (part if value.is_floating_point() else part.to(value.dtype)).reshape(-1, *value.shape[1:])
        for (name, value), part in parts
    }


CONTAINERS: tuple[Container, ...] = (
    Container("tuple", lambda fields: tuple(fields.values()), _listed),
    Container("list", lambda fields: list(fields.values()), _listed, None, _set_first),
    Container("dict", dict, lambda batch, like: dict(batch), lambda batch, like: batch.pop("y"), _set_item),
    Container(
        "user dict", lambda fields: Encoding(fields), _by_attribute, lambda batch, like: batch.pop("y"), _set_item
    ),
    Container("dataclass", _as_dataclass, _by_attribute, None, _set_attribute),
    Container("named tuple", lambda fields: Masked(**fields), _by_attribute),
    Container("one tensor", _one_tensor, _from_one_tensor),
    Container("nested dict", _nested, _from_nested, lambda batch, like: batch["targets"][0].pop("y"), _set_nested),
)


def _uneven(rng: random.Random) -> list[int]:
    sizes = rng.choice([[7, 50, 3], [1, 20], [13, 2, 2, 9], [30, 1, 1], [5, 4, 3, 2, 1]])
    return rng.sample(sizes, len(sizes))


CUTS: Mapping[Callable[[random.Random], list[int]], int] = {
    lambda rng: [rng.choice([1, 2, 5, 12, 24, 40])]: 16,
    lambda rng: [rng.choice([4, 8, 16])] * rng.choice([2, 3]): 8,
    _uneven: 11,
    lambda rng: [1] * rng.choice([3, 6]): 4,
    lambda rng: [2] * 20: 1,
}
"""Ways to cut samples into batches, from a random number generator to their sizes, and how often they are drawn."""


def batches_of(container: Container, fields: Fields, sizes: list[int]) -> list[Any]:
    """The fields, cut and packed; each batch has memory of its own."""
    parts = {name: value.split(sizes) for name, value in fields.items()}
    return [container.pack({name: part[i].clone() for name, part in parts.items()}) for i in range(len(sizes))]

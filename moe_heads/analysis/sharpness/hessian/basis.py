"""Orthonormal basis of a Krylov space, and random start vectors of Krylov and trace methods."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Basis", "dot", "norm", "rademacher", "uniform"]

# Rows and bytes of one allocation. The basis grows without copying, and without memory for steps that never come.
_ROWS, _BLOCK_BYTES = 16, 2**27

# Number of entries summed in their own precision before the sums are added in float64.
_CHUNK = 2**16

# Columns of the basis combined at a time, because they are overwritten in place.
_COLUMNS = 2**18


class Basis:
    """Orthonormal vectors :math:`q_1 .. q_m` of length P, with m·P numbers of memory.

    Args:
        dim: P.
        dtype: Data type of the vectors.
        device: Device of the vectors.
    """

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dim, self.dtype, self.device = dim, dtype, device
        self._blocks: list[Tensor] = []
        self._length = 0
        self._rows = min(max(_BLOCK_BYTES // max(dim * dtype.itemsize, 1), 1), _ROWS)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        """Return the vector at an index, shape (P,). Negative indices count from the end."""
        index = index % self._length
        return self._blocks[index // self._rows][index % self._rows]

    def reserve(self) -> bool:
        """Make room for one more vector. Return True."""
        if self._length == self._rows * len(self._blocks):
            self._blocks.append(torch.empty(self._rows, self.dim, dtype=self.dtype, device=self.device))
        return True

    def append(self, vector: Tensor, length: float = 1.0) -> None:
        """Add a copy of a vector that is orthogonal to the others, divided by its length."""
        self.reserve()
        torch.div(vector, length, out=self._blocks[self._length // self._rows][self._length % self._rows])
        self._length += 1

    def complement(self, vectors: Tensor, *, in_place: bool = False) -> Tensor:
        r"""Return :math:`(I - QQ^T)v` for one vector (P,) or several (n, P)."""
        return self.split(vectors, in_place=in_place)[0]

    def split(self, vectors: Tensor, *, in_place: bool = False) -> tuple[Tensor, Tensor]:
        r"""Return :math:`(I - QQ^T)v` and :math:`Q^T v` for one vector (P,) or several (n, P).

        One pass of Gram-Schmidt leaves rounding errors relative to the size of ``v``. They matter if less
        than 70 % of the length of a vector remains, and a second pass follows (Daniel, Gragg, Kaufman and Stewart
        1976).

        Args:
            vectors: v.
            in_place: Whether to overwrite ``vectors`` with the first result.
        """
        rows = (vectors if in_place else vectors.clone(memory_format=torch.contiguous_format)).view(-1, self.dim)
        lengths = torch.linalg.vector_norm(rows, dim=1)
        coefficients = self._one_pass(rows)
        if bool((torch.linalg.vector_norm(rows, dim=1) < 0.7 * lengths).any()):
            coefficients = coefficients + self._one_pass(rows)
        return rows.view_as(vectors), coefficients.view(*vectors.shape[:-1], -1)

    def combined(self, coefficients: Tensor) -> Tensor:
        """Return the linear combinations :math:`CQ`, shape (k, P), for ``coefficients`` (k, m)."""
        weights = coefficients.to(self.device, self.dtype)
        total = torch.empty(len(weights), self.dim, dtype=self.dtype, device=self.device)
        # by columns, so that a piece of all vectors stays in the cache and nothing of their size is allocated
        for start in range(0, self.dim, _COLUMNS):
            columns = torch.cat([block[:, start : start + _COLUMNS] for block in self._filled()])
            # an interrupted step may have left one vector more
            total[:, start : start + _COLUMNS] = weights @ columns[: weights.shape[1]]
        return total

    def replace(self, coefficients: Tensor) -> None:
        """Replace Q by the combinations :math:`CQ`, for C (k, m) with orthonormal rows, in place."""
        weights = coefficients.to(self.device, self.dtype)
        for start in range(0, self.dim, _COLUMNS):
            columns = torch.cat([block[:, start : start + _COLUMNS] for block in self._filled()])
            for block, part in zip(self._blocks, (weights @ columns).split(self._rows), strict=False):
                block[: len(part), start : start + _COLUMNS] = part
        self._length = len(weights)
        del self._blocks[-(-self._length // self._rows) :]

    def gram(self, places: Sequence[slice], others: Sequence[Tensor] = ()) -> Tensor:
        r"""Return :math:`Q P Q^T` for the projection P on some places of the vectors, (m, m), float64 on the CPU.

        Args:
            places: Slices of the vectors.
            others: Further vectors (P,). Each adds a row and a column.
        """
        size = self._length + len(others)
        total = torch.zeros(size, size, dtype=torch.float64)
        for place in places:
            for start in range(place.start, place.stop, _COLUMNS):
                columns = slice(start, min(start + _COLUMNS, place.stop))
                parts = [block[:, columns] for block in self._filled()]
                parts += [other[None, columns] for other in others]
                rows = torch.cat(parts)
                total += (rows @ rows.T).to("cpu", torch.float64)
        return total

    def _one_pass(self, rows: Tensor) -> Tensor:
        """Subtract the part of the rows in the basis in place. Return its coefficients."""
        blocks = self._filled()
        if self.device.type == "cpu" and self.dim > _COLUMNS:
            return self._one_pass_by_columns(rows, blocks)
        found = []
        for block in blocks:
            found.append(rows @ block.T)
            rows.addmm_(found[-1], block, alpha=-1)
        return torch.cat(found, dim=1) if found else rows.new_zeros(len(rows), 0)

    def _one_pass_by_columns(self, rows: Tensor, blocks: Sequence[Tensor]) -> Tensor:
        """Do the same for long vectors, whose inner products would lose four digits in one sum of float32."""
        found = rows.new_zeros(len(rows), self._length, dtype=torch.float64)
        places = [slice(start, start + _CHUNK) for start in range(0, self.dim, _CHUNK)]
        for place in places:
            parts = [rows[:, place] @ block[:, place].T for block in blocks]
            found += torch.cat(parts, dim=1) if parts else 0
        weights = found.to(self.dtype).split([len(block) for block in blocks], dim=1)
        for place in places:
            for weight, block in zip(weights, blocks, strict=True):
                rows[:, place].addmm_(weight, block[:, place], alpha=-1)
        return found

    def _filled(self) -> list[Tensor]:
        blocks = [block[: self._length - index * self._rows] for index, block in enumerate(self._blocks)]
        return [block for block in blocks if len(block)]


def rademacher(dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Return independent signs ±1, shape (dim,), drawn on the CPU to be the same on every device."""
    # Each random byte gives eight signs. Drawing them one by one takes ten times as long.
    octets = torch.randint(0, 256, (-(-dim // 8), 1), dtype=torch.uint8, generator=generator)
    bits = octets.bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and_(1)
    return bits.flatten()[:dim].to(device, dtype).mul_(2).sub_(1)


def uniform(dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Draw independent numbers of mean 0 and variance 1 from 256 equally likely levels, shape (dim,), on the CPU.

    For random signs, a form :math:`z^T A z` that rests on one pair of entries has only two values, and a few draws may
    all show the same one. The spread of these numbers shows in the first two draws.
    """
    words = torch.randint(-(2**63), 2**63 - 1, (-(-dim // 8),), generator=generator)
    return words.view(torch.uint8)[:dim].to(device, dtype).sub_(127.5).div_(math.sqrt((256**2 - 1) / 12))


def dot(left: Tensor, right: Tensor) -> float:
    """Return the inner product, with pieces in the precision of the vectors and their sum in float64."""
    pieces = [torch.dot(a, b) for a, b in zip(left.split(_CHUNK), right.split(_CHUNK), strict=True)]
    return float(torch.stack(pieces).sum(dtype=torch.float64))


def norm(vector: Tensor) -> float:
    """Return the Euclidean norm, summed as in `dot`, of a vector of any scale."""
    square = dot(vector, vector)
    if 1e-20 < square < 1e30:
        return math.sqrt(square)
    # The squares of the entries may be too small or too large for their data type.
    largest = float(vector.abs().max())
    if largest == 0 or not math.isfinite(largest):
        return largest
    scaled = vector / largest
    return math.sqrt(dot(scaled, scaled)) * largest

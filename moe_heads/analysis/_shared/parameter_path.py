"""Movement of the tensors of a model along directions, with exact end points."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_heads.analysis._shared.shards import Shards, is_shard, is_sharded, local, reshard
from moe_heads.analysis._shared.state import write_back

__all__ = ["ParameterPath", "Steps", "Target"]


@dataclass(frozen=True)
class Target:
    """Exact values of a tensor at coordinate 1, which adding a difference would miss by rounding."""

    end: Tensor


Steps = Mapping[str, Tensor | Target]
"""One direction: the step to coordinate 1, or the target values there, by the name of the parameter or buffer."""


class ParameterPath:
    """Parameters and buffers of a model that move in place along directions.

    `analysis_mode` restores them. Shared parameters move once.

    Of a sharded model, each process moves its parts. All processes create the path, and move to the same points.

    Args:
        model: The model.
        directions: The directions, in the shapes of the local parts. Tensors without a nonzero step are not stored.
        original: Returns the start values of a tensor, such as those that `analysis_mode` holds. By default the current
            values are copied.

    Attributes:
        moved: The tensors that move.
        num_directions: Number of coordinates.
    """

    def __init__(
        self, model: nn.Module, directions: Sequence[Steps], original: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        original = original or (lambda tensor: tensor.detach().clone())
        named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        names = [name for name in named if any(_moves(steps.get(name)) for steps in directions)]
        self.num_directions = len(directions)
        self.moved = [named[name] for name in names]
        self._moves = [
            (local(named[name]), local(original(named[name])), [steps.get(name) for steps in directions])
            for name in names
        ]
        self._sharded = model if is_sharded(model) else None
        self._shares = [1.0] * len(names)
        self._squares: Tensor | None = None
        if self._sharded is not None:
            shards = Shards(p for p in model.parameters() if is_shard(p))
            # a tensor that all processes hold counts once
            self._shares = [1.0 if is_shard(named[name]) else 1 / shards.num_processes for name in names]
            self._squares = shards.all_reduce(self._own_squares())

    @property
    def norms(self) -> tuple[float, ...]:
        """Length of a unit step along each direction."""
        squares = self._own_squares() if self._squares is None else self._squares
        return tuple(squares.sqrt().tolist())

    def _own_squares(self) -> Tensor:
        """Return the squared length of a unit step, by direction; of a sharded model, this process's share of it."""
        squares = [0.0] * self.num_directions
        for (_, start, steps), share in zip(self._moves, self._shares, strict=True):
            for number, step in enumerate(steps):
                if step is not None:
                    step = step.end - start if isinstance(step, Target) else step
                    squares[number] += share * float(torch.linalg.vector_norm(step)) ** 2
        return torch.tensor(squares, dtype=torch.float64)

    @torch.no_grad()
    def go(self, coordinates: Sequence[float]) -> None:
        """Move to the start plus the sum of the directions times their coordinates."""
        if self._sharded is not None:
            reshard(self._sharded)
        # always from the start, never from the last point: rounding errors do not accumulate
        for tensor, start, steps in self._moves:
            used = [(c, step) for c, step in zip(coordinates, steps, strict=True) if c and step is not None]
            if all(isinstance(step, Tensor) for _, step in used) and _is_dense(tensor):
                _add(tensor.data, start, used)
            else:
                write_back(tensor, _place(start, used))


def _moves(step: Tensor | Target | None) -> bool:
    if step is None or isinstance(step, Target):
        return step is not None
    return step.numel() > 0 and any(map(bool, torch.aminmax(step)))  # any() would allocate memory


def _is_dense(tensor: Tensor) -> bool:
    return not tensor.is_inference() and tensor.layout == torch.strided and 0 not in tensor.stride()


def _add(target: Tensor, start: Tensor, used: Sequence[tuple[float, Tensor | Target]]) -> None:
    """Set ``target`` to start plus steps, without temporary memory."""
    if not used:
        target.copy_(start)
    for coordinate, step in used:
        assert isinstance(step, Tensor)
        torch.add(start, step, alpha=coordinate, out=target)
        start = target


def _place(start: Tensor, used: Sequence[tuple[float, Tensor | Target]]) -> Tensor:
    if len(used) == 1 and isinstance(used[0][1], Target):
        return torch.lerp(start, used[0][1].end, used[0][0])  # exact at 0 and at 1
    place = start.clone()
    for coordinate, step in used:
        place.add_(step.end - start if isinstance(step, Target) else step, alpha=coordinate)
    return place

"""Compute once what lies before the moved parameters: the backbone below a head that is perturbed."""

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from moe_heads.analysis._shared.environment import device_of
from moe_heads.analysis._shared.forwards import intercepted
from moe_heads.analysis._shared.memory import memory_budget
from moe_heads.analysis.loss_landscape.calls import Call, draws_numbers, largest_below
from moe_heads.analysis.loss_landscape.saving import Saving

__all__ = ["Features"]

_CPU_MEMORY, _SHARE_OF_GPU = 2**30, 1 / 4


class Features(Saving):
    """Outputs of the modules before the moved tensors, kept at the center and handed out wherever the inputs recur.

    A module none of whose tensors moves gives the same outputs for the same inputs. So each call is replayed only where
    its inputs are those of a kept one, the same tensors or equal to the bit; where they are not, it is made. What
    happens after a module that moves has run is not kept: its inputs would not recur. Left out are modules that draw
    random numbers, hold a router (its choices are collected by hooks) or have hooks inside, and passes with a graph.

    Nothing is replayed while the center is recorded. A module that changes something besides its output, or looks at
    a moved tensor that it does not hold, would go unnoticed, so the first points are measured both ways: see `Saving`.

    Args:
        model: The model.
        moved: Its tensors that move.
        memory: Bytes that may be kept; by default 1 GiB on a CPU, a quarter of what is free on a GPU.

    Attributes:
        device: Where the model is.
        names: Modules that are computed once; empty where there is none.
    """

    def __init__(self, model: nn.Module, moved: Collection[Tensor], memory: int | None = None) -> None:
        self.device = device_of(model)
        self._memory = memory
        self._names = {module: name for name, module in model.named_modules()}
        moving = {id(tensor) for tensor in moved}

        def moves(tensors: Iterable[Tensor]) -> bool:
            return any(id(tensor) in moving for tensor in tensors)

        below = largest_below(model, lambda m: not moves([*m.parameters(), *m.buffers()]))
        self._modules = list(dict.fromkeys(below))
        self._owners = {m for m in model.modules() if moves([*m.parameters(False), *m.buffers(False)])}
        self._calls: dict[tuple[int, nn.Module], list[Call]] = {}
        self._sizes: dict[int, int] = {}
        self._index, self._records, self._is_before = 0, False, False
        super().__init__(is_on=bool(self._modules))

    @property
    def names(self) -> tuple[str, ...]:
        """Modules that are computed once, by their name in the model."""
        kept = {module for _, module in self._calls} if self.is_on else set()
        return tuple(name for module, name in self._names.items() if module in kept)

    def active(self) -> AbstractContextManager[None]:
        """The block in which passes are recorded and replayed."""
        return intercepted([*self._modules, *self._owners], self._called)

    def begin(self, index: int, *, records: bool) -> None:
        """The next pass is over this batch, at the center if it records."""
        self._index, self._records, self._is_before = index, records, True

    def forget(self) -> None:
        """Let go of what was kept: the center is measured anew."""
        self._calls, self._sizes = {}, {}

    @override
    def prove(self) -> None:
        super().prove()
        # what did not recur is let go
        hit = {key: [call for call in calls if call.num_hits] for key, calls in self._calls.items()}
        self._calls = {key: calls for key, calls in hit.items() if calls}

    @override
    def give_up(self, reason: str) -> None:
        super().give_up(reason)
        self.forget()

    def _called(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if module in self._owners:
            self._is_before = False
            return forward(*args, **kwargs)
        if not self.is_on or torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if not self._records:
            for call in self._calls.get((self._index, module), ()):
                if call.has_inputs(args, kwargs):
                    call.num_hits += 1
                    return self.replay(call, lambda: forward(*args, **kwargs))
            return forward(*args, **kwargs)
        if not self._is_before:
            return forward(*args, **kwargs)
        drew: list[bool] = []
        with draws_numbers(self.device, drew):
            call, output = Call.made(forward, args, kwargs)
        if not drew[0] and call.is_replayable and self._has_room(call):
            self._calls.setdefault((self._index, module), []).append(call)
        return output

    def _has_room(self, call: Call) -> bool:
        if self._memory is None:
            self._memory = memory_budget(self.device, on_cpu=_CPU_MEMORY, share_of_gpu=_SHARE_OF_GPU)
        new = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in call.tensors}
        sizes = self._sizes | new
        if sum(sizes.values()) > self._memory:
            return False
        self._sizes = sizes
        return True

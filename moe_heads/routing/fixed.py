"""Hold the choices of the routers inside any model fixed, while everything else about them goes on."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from moe_heads.modes import in_backward
from moe_heads.routing.adapters import named_routers
from moe_heads.routing.collection import RoutingCollection
from moe_heads.routing.router import Router
from moe_heads.routing.routing import Routing

__all__ = ["fixed_routing"]


@contextmanager
def fixed_routing(model: nn.Module, reference: RoutingCollection) -> Iterator[None]:
    r"""Replay the choices in ``reference`` in every router of ``model`` while the block runs.

    The loss of a sparse head is piecewise smooth, :math:`L(\theta) = L(\theta, I(\theta))`: it jumps where the choice I
    of the experts changes, and its gradient and Hessian are those at fixed I. Inside the block
    :math:`L(\theta, I_\text{ref})` is evaluated, which is smooth in :math:`\theta`. The logits and the mixing weights
    are those of the model as it is now, with their gradient (see `Router.rechosen`). At the parameters of the record
    nothing changes, to the bit. A soft router has no choice to hold.

    A router's passes take the records in their order: the same inputs have to come in the order in which they were
    recorded. `collect_routing`, around the block or in it, sees the routing as it was used. Of two nested blocks the
    outer one decides. Works by forward hooks, removed when the block ends, however it ends.

    Meant for evaluation mode. Noise that is drawn in training enters the weights but not the choice, and a
    `BiasBalancedRouter` counts what it would have chosen. With gradient checkpointing call backward inside the block:
    the second pass that it makes replays the record of the first.

    Args:
        model: Any module; heads may sit at any depth.
        reference: What `collect_routing` recorded in this model, with or without a gradient; its graph is not used.

    Raises:
        ValueError: If the reference names routers that the model lacks; if a router sees another number of rows or of
            experts than was recorded, runs more often or (at the end of the block) less often; if a sparse router does
            not define `Router.rechosen`.

    Example:
        >>> import torch
        >>> from moe_heads import SparseMoE, collect_routing, fixed_routing
        >>> head = SparseMoE(16, 3, num_experts=4, k=1).eval()
        >>> x = torch.randn(50, 16)
        >>> with torch.no_grad(), collect_routing(head) as reference:
        ...     before = head(x)
        >>> _ = head.router.gate.weight.data.neg_()
        >>> with fixed_routing(head, reference), collect_routing(head) as now:
        ...     after = head(x)
        >>> torch.equal(now.routings["head"][0].indices, reference.routings["head"][0].indices)
        True
        >>> torch.equal(after, before)  # the weights of the choices have moved
        False
    """
    routers = named_routers(model)
    unknown = [name for name, passes in reference.routings.items() if passes and name not in routers]
    if unknown:
        raise ValueError(f"reference: expected passes of the model's routers {list(routers)}, got some of {unknown}")
    replays = [_Replay(name, reference.routings.get(name, ())) for name in routers]
    with ExitStack() as stack:
        for replay, router in zip(replays, routers.values(), strict=True):
            # before other hooks: what they see is what was used
            stack.callback(router.register_forward_hook(replay, prepend=True).remove)
        yield
    for replay in replays:
        replay.check_complete()


class _Replay:
    """The recorded passes of one router, handed out in their order."""

    def __init__(self, name: str, passes: Sequence[Routing]) -> None:
        self._name = name
        self._passes = [routing.detach() for routing in passes]
        self._num_done = 0
        self._logits: list[Tensor] = []

    def __call__(self, router: Router, args: object, output: Routing) -> Routing:
        reference = self._again(output) if in_backward() else self._next(output)
        found, expected = _layout(output), _layout(reference)
        if found != expected:
            raise ValueError(
                f"reference: expected in pass {self._num_done} of router {self._name!r} what was recorded, {expected};"
                f" got {found}"
            )
        return router.rechosen(output, reference)

    def check_complete(self) -> None:
        if self._num_done < len(self._passes):
            raise ValueError(
                f"reference: expected {len(self._passes)} passes of router {self._name!r} as recorded; got"
                f" {self._num_done} (a model that was compiled before does not call forward hooks)"
            )

    def _next(self, output: Routing) -> Routing:
        self._num_done += 1
        if self._num_done > len(self._passes):
            raise ValueError(
                f"reference: expected {len(self._passes)} passes of router {self._name!r} as recorded, got one more"
            )
        self._logits.append(output.logits.detach().nan_to_num())
        return self._passes[self._num_done - 1]

    def _again(self, output: Routing) -> Routing:
        """The record of the pass that gradient checkpointing runs once more, in an order of its own."""
        # detached: checkpointing counts what the second pass saves for backward
        found = output.logits.detach().nan_to_num()
        for reference, logits in zip(self._passes, self._logits, strict=False):
            if self._num_done == 1 or torch.equal(logits, found):
                return reference
        raise ValueError(
            f"model: expected in backward the logits of one of the {self._num_done} passes of router {self._name!r} in"
            " this block, got others (from a pass before the block, or a checkpoint that is not deterministic)"
        )


def _layout(routing: Routing) -> str:
    """What two routings must have in common for one to take the choices of the other."""
    rows, experts = routing.logits.shape
    size = f"{rows} rows ({routing.rows_per_sample} a sample), {experts} experts"
    if routing.indices is not None:
        return f"{size}, {routing.indices.shape[-1]} chosen a row"
    return f"{size}, all run" if routing.rows is None else f"{size}, {routing.rows.shape[-1]} rows chosen an expert"

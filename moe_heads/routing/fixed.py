"""Fixed choices of the routers inside any model, while their weights remain a function of the parameters."""

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
    of the experts changes, and its gradient and Hessian are those at fixed I. The block evaluates
    :math:`L(\theta, I_\text{ref})`, which is smooth in :math:`\theta`. The logits and the mixing weights are those of
    the current model, with their gradient (see `Router.rechosen`). At the parameters of the recording the output is
    bit for bit the same. A soft router makes no choices, so nothing is fixed.

    The passes of a router use the recorded choices in order, so the inputs must come in the order of the recording.
    `collect_routing`, around the block or inside it, collects the routing with the fixed choices. If two blocks are
    nested, the outer one decides. The block uses forward hooks, which are removed when it ends, also after an error.

    Use it in evaluation mode. In training, the noise enters the weights but not the choice, and a router that balances
    itself by a bias counts the choices that it would have made. With gradient checkpointing, call backward inside the
    block: its second pass replays the recorded choices of the first.

    Args:
        model: Any module. Heads may be nested at any depth.
        reference: Collection that `collect_routing` recorded in this model, with or without a gradient. Its graph is
            not used.

    Raises:
        ValueError: If the reference names routers that the model lacks, if a router receives a different number of
            rows or experts than was recorded, if it runs more often or (at the end of the block) less often, or if a
            sparse router does not define `Router.rechosen`.

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
        raise ValueError(
            f"reference: expected passes of the model's routers {list(routers)}, got some of {unknown}. Record the"
            " reference with collect_routing on this model."
        )
    replays = [_Replay(name, reference.routings.get(name, ())) for name in routers]
    with ExitStack() as stack:
        for replay, router in zip(replays, routers.values(), strict=True):
            # before other hooks, so that they receive the fixed choices
            stack.callback(router.register_forward_hook(replay, prepend=True).remove)
        yield
    for replay in replays:
        replay.check_complete()


class _Replay:
    """Forward hook that replays the recorded passes of one router in order."""

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
                f"reference: expected {expected} as recorded in pass {self._num_done} of router {self._name!r}, got"
                f" {found}. Run the model on the inputs of the recording, in the same order."
            )
        return router.rechosen(output, reference)

    def check_complete(self) -> None:
        if self._num_done < len(self._passes):
            raise ValueError(
                f"reference: expected {len(self._passes)} passes of router {self._name!r} as recorded, got"
                f" {self._num_done}. Run the model on all inputs of the recording. A model that was compiled before"
                " does not call forward hooks."
            )

    def _next(self, output: Routing) -> Routing:
        self._num_done += 1
        if self._num_done > len(self._passes):
            raise ValueError(
                f"reference: expected {len(self._passes)} passes of router {self._name!r} as recorded, got one more."
                " Run the model only on the inputs of the recording."
            )
        self._logits.append(output.logits.detach().nan_to_num())
        return self._passes[self._num_done - 1]

    def _again(self, output: Routing) -> Routing:
        """Return the recorded pass that gradient checkpointing repeats, in an order of its own."""
        # detached: checkpointing counts the tensors that the second pass saves for backward
        found = output.logits.detach().nan_to_num()
        for reference, logits in zip(self._passes, self._logits, strict=False):
            if self._num_done == 1 or torch.equal(logits, found):
                return reference
        raise ValueError(
            f"model: expected in backward the logits of one of the {self._num_done} passes of router {self._name!r} in"
            " this block, got different ones. Run forward and backward inside the block, with deterministic gradient"
            " checkpointing."
        )


def _layout(routing: Routing) -> str:
    """Describe the properties that two routings must share for one to take the choices of the other."""
    rows, experts = routing.logits.shape
    size = f"{rows} rows ({routing.rows_per_sample} per sample), {experts} experts"
    if routing.indices is not None:
        return f"{size}, {routing.indices.shape[-1]} chosen per row"
    return f"{size}, all run" if routing.rows is None else f"{size}, {routing.rows.shape[-1]} rows chosen per expert"

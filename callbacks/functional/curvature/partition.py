"""Cut a traced graph into what is constant and what depends on some of its inputs, and let the latter reuse memory."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["merge_equal", "refuse_dynamic_sizes", "reuse_memory", "split_by_inputs"]

# Operations that may hand on their argument although their schema does not say so.
_HIDDEN_VIEWS = {torch.ops.aten._unsafe_view.default, torch.ops.aten._reshape_alias.default}

_aten = torch.ops.aten

_DYNAMIC = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}

# Element by element, and their forms that overwrite the first argument.
_IN_PLACE = {
    _aten.add.Tensor: _aten.add_.Tensor,
    _aten.sub.Tensor: _aten.sub_.Tensor,
    _aten.mul.Tensor: _aten.mul_.Tensor,
    _aten.div.Tensor: _aten.div_.Tensor,
    _aten.neg.default: _aten.neg_.default,
}
_COMMUTATIVE = {_aten.add.Tensor, _aten.mul.Tensor}


def refuse_dynamic_sizes(graph: fx.GraphModule) -> None:
    """Refuse operations whose result has a size that depends on values: the program has fixed those of one batch.

    Raises:
        ValueError: If there is one.
    """
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and not _DYNAMIC.isdisjoint(node.target.tags):
            raise ValueError(f"the size of what {node.target} gives depends on the values in the batch")


def merge_equal(graph: fx.GraphModule) -> None:
    """Compute once what a program computes twice: nested transformations trace the same primal again and again."""
    aliases = _Aliases(graph.graph.nodes)
    written = {member for node in graph.graph.nodes if _is_mutation(node) for member in aliases.of(node)}
    first: dict[object, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op not in {"call_function", "get_attr"} or node in written or _is_random(node):
            continue
        # slices and lists among the arguments cannot be hashed: their text names the nodes in them
        key = (node.target, repr(node.args), repr(node.kwargs))
        if key in first:
            node.replace_all_uses_with(first[key])
            graph.graph.erase_node(node)
        else:
            first[key] = node
    graph.recompile()


def split_by_inputs(graph: fx.GraphModule, inputs: Collection[int]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Two programs with ``graph(*a) == after(*before(*others), *chosen)`` for the chosen inputs and the others.

    Args:
        graph: A program without control flow, as `make_fx` traces it.
        inputs: Positions of the chosen inputs.

    Returns:
        ``before``, which computes from the other inputs all that the rest needs, and ``after``.
    """
    nodes = list(graph.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    chosen = [placeholders[i] for i in inputs]
    dependent = _dependent(nodes, chosen)
    output = nodes[-1]
    needed = list(
        dict.fromkeys(
            source
            for node in [*nodes[:-1], output]
            if node in dependent or node is output
            for source in node.all_input_nodes
            if source not in dependent
        )
    )
    before = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node not in dependent and node is not output:
            copies[node] = before.node_copy(node, copies.__getitem__)
    before.output(tuple(copies[node] for node in needed))
    after = fx.Graph()
    copies = {node: _placeholder(after, node) for node in [*needed, *chosen]}
    for node in nodes:
        if node in dependent and node.op != "placeholder":
            copies[node] = after.node_copy(node, copies.__getitem__)
    after.output(fx.map_arg(output.args[0], copies.__getitem__))
    return _module(graph, before), _module(graph, after)


def reuse_memory(program: fx.GraphModule) -> None:
    """Let elementwise operations overwrite an argument that nothing needs any more.

    A product is mostly convolutions; what is left is memory traffic, and new memory costs more than old.
    """
    graph = program.graph
    order = {node: place for place, node in enumerate(graph.nodes)}
    aliases = _Aliases(graph.nodes)
    for node in graph.nodes:
        for argument in _overwritable(node):
            if _is_free_at(argument, node, aliases, order) and _is_alike(argument, node):
                _overwrite(node, argument)
                aliases.join(argument, node)
                break
    program.recompile()


def _dependent(nodes: list[fx.Node], chosen: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes that depend on the chosen ones, also by being written to."""
    aliases = _Aliases(nodes)
    dependent, before = set(chosen), -1
    while len(dependent) > before:
        before = len(dependent)
        for node in nodes[:-1]:
            if node.op != "placeholder" and not dependent.isdisjoint(node.all_input_nodes):
                dependent.add(node)
            if node in dependent and _is_mutation(node):
                # what is overwritten in each run has to be made anew in each run
                dependent |= {other for other in aliases.of(node) if other.op == "call_function"}
    return dependent


class _Aliases:
    """Which nodes of a graph share memory."""

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self._groups: dict[fx.Node, set[fx.Node]] = {}
        self.views: set[fx.Node] = set()
        for node in nodes:
            self._groups[node] = {node}
            for source in _viewed(node):
                self.views.add(node)
                self.join(source, node)

    def of(self, node: fx.Node) -> set[fx.Node]:
        return self._groups[node]

    def join(self, one: fx.Node, other: fx.Node) -> None:
        group = self._groups[one] | self._groups[other]
        for member in group:
            self._groups[member] = group


def _viewed(node: fx.Node) -> list[fx.Node]:
    """Arguments whose memory the result of a node may share."""
    if node.op != "call_function":
        return []
    if not isinstance(node.target, torch._ops.OpOverload):
        # a part of what an operation returned
        (source,) = node.all_input_nodes
        return [source] if _viewed(source) else []
    if node.target in _HIDDEN_VIEWS:
        return node.all_input_nodes
    schema = node.target._schema
    if all(result.alias_info is None for result in schema.returns):
        return []
    shared = [a for a, argument in zip(node.args, schema.arguments, strict=False) if argument.alias_info is not None]
    return [a for a in [*shared, *node.kwargs.values()] if isinstance(a, fx.Node)]


def _is_mutation(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _overwritable(node: fx.Node) -> list[fx.Node]:
    """Arguments into which a node could write its result."""
    if node.target is _aten.threshold_backward.default:
        candidates = node.args[:1]
    elif node.target in _IN_PLACE and not node.kwargs:
        candidates = node.args[:2] if node.target in _COMMUTATIVE else node.args[:1]
    else:
        return []
    return [argument for argument in candidates if isinstance(argument, fx.Node)]


def _is_free_at(argument: fx.Node, node: fx.Node, aliases: _Aliases, order: dict[fx.Node, int]) -> bool:
    """Whether the memory of an argument was made in this program and is not looked at after the node."""
    group = aliases.of(argument)
    if any(member.op != "call_function" for member in group) or argument in aliases.views:
        return False
    if sum(isinstance(a, fx.Node) and a in group for a in node.args) > 1:
        return False
    return max(order[user] for member in group for user in member.users) <= order[node]


def _is_alike(argument: fx.Node, node: fx.Node) -> bool:
    there, here = argument.meta.get("val"), node.meta.get("val")
    if not isinstance(there, Tensor) or not isinstance(here, Tensor):
        return False
    return (there.shape, there.dtype, there.stride()) == (here.shape, here.dtype, here.stride())


def _overwrite(node: fx.Node, argument: fx.Node) -> None:
    if node.target is _aten.threshold_backward.default:
        node.target, node.kwargs = _aten.threshold_backward.grad_input, {"grad_input": argument}
        return
    others = [other for other in node.args if other is not argument]
    operation: Any = node.target
    node.target, node.args = _IN_PLACE[operation], (argument, *others)


def _placeholder(graph: fx.Graph, node: fx.Node) -> fx.Node:
    made = graph.placeholder(node.name)
    made.meta = node.meta
    return made


def _module(owner: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(owner, graph)

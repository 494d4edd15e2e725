"""Checks of the options of `sharpness` that do not depend on the model."""

from collections.abc import Mapping
from typing import Any, get_args

from moe_heads.analysis._shared.names import are_names
from moe_heads.analysis.sharpness.hessian.both_ends import Which
from moe_heads.analysis.sharpness.hessian.products import Matrix
from moe_heads.analysis.sharpness.hessian.trace import MIN_PROBES
from moe_heads.analysis.sharpness.model_outputs import check_matrix
from moe_heads.checks import check_at_least, check_flags, check_option, check_positive

__all__ = ["check_sharpness_options"]


def check_sharpness_options(
    *,
    num_eigenvalues: Any,
    tolerance: Any,
    trace_tolerance: Any,
    max_steps: Any,
    max_probes: Any,
    density: Any,
    blocks: Any,
    block_eigenvalues: Any,
    routing_steps: Any,
    perturbation: Any,
    graph_memory: Any,
    basis_memory: Any,
    matrix: Any = "hessian",
    which: Any = "largest",
    outputs_fn: Any = None,
    output_loss: Any = None,
    trace: Any = True,
    skip_double_check: Any = "",
) -> None:
    """Raise a ValueError for options of `sharpness` that are invalid for every model."""
    check_at_least(1, num_eigenvalues=num_eigenvalues, max_steps=max_steps)
    check_at_least(MIN_PROBES, max_probes=max_probes)
    check_positive(tolerance=tolerance, trace_tolerance=trace_tolerance)
    if max_steps < num_eigenvalues:
        raise ValueError(f"max_steps: expected at least num_eigenvalues = {num_eigenvalues}, got {max_steps}.")
    check_option("which", which, get_args(Which))
    check_option("matrix", matrix, get_args(Matrix))
    check_matrix(matrix, outputs_fn, output_loss)
    check_flags(density=density, block_eigenvalues=block_eigenvalues, perturbation=perturbation, trace=trace)
    if not isinstance(skip_double_check, str):
        raise ValueError(f"skip_double_check: expected the reason as text, or '', got {skip_double_check!r}.")
    check_at_least(0, or_none=True, graph_memory=graph_memory, basis_memory=basis_memory)
    if blocks is not None:
        _check_blocks(blocks)
    if not isinstance(routing_steps, (list, tuple)):
        raise ValueError(f"routing_steps: expected a list of finite numbers above 0, got {routing_steps!r}.")
    check_positive(**{f"routing_steps[{place}]": step for place, step in enumerate(routing_steps)})
    if len(set(routing_steps)) < len(routing_steps):
        raise ValueError(f"routing_steps: expected distinct numbers, got {routing_steps!r}.")


def _check_blocks(blocks: Any) -> None:
    if not isinstance(blocks, Mapping) or not blocks or not all(isinstance(block, str) for block in blocks):
        raise ValueError(f"blocks: expected a mapping from names of blocks to lists of names, got {blocks!r}.")
    for block, members in blocks.items():
        if not are_names(members):
            raise ValueError(f"blocks[{block!r}]: expected a list of names of parameters or modules, got {members!r}.")

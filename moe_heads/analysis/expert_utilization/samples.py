"""Rows of a router that belong to the samples of a batch."""

from dataclasses import replace

from moe_heads.analysis._shared.batches import Batch, batch_size
from moe_heads.routing import Routing

__all__ = ["group_by_sample"]


def group_by_sample(routing: Routing, batch: Batch, num_samples: int | None = None) -> Routing:
    """Treat the rows of a third-party router as the consecutive tokens of the samples, if their number allows it.

    Args:
        routing: Routing of an adapter. If it has ``rows_per_sample``, it is returned unchanged.
        batch: Batch on which the model ran.
        num_samples: Number of samples of the batch. By default it is read from its tensors.
    """
    try:
        num_samples = batch_size(batch) if num_samples is None else num_samples
    except ValueError:  # the number of samples is unknown
        return routing
    num_rows = len(routing.logits)
    is_flat = routing.rows_per_sample == 1 and num_rows > num_samples and num_rows % num_samples == 0
    return replace(routing, rows_per_sample=num_rows // num_samples) if is_flat else routing

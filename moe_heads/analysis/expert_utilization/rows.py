"""Which rows of somebody else's router belong to one sample."""

from dataclasses import replace

from moe_heads.analysis._shared.batches import Batch, batch_size
from moe_heads.routing import Routing

__all__ = ["of_samples"]


def of_samples(routing: Routing, batch: Batch, num_samples: int | None = None) -> Routing:
    """The routing with its rows taken for the tokens of one sample after the other, where their number allows it.

    Args:
        routing: Of an adapter; one that tells ``rows_per_sample`` stays as it is.
        batch: What the model was run on.
        num_samples: Its number of samples; by default its tensors tell.
    """
    try:
        num_samples = batch_size(batch) if num_samples is None else num_samples
    except ValueError:  # nobody knows how many samples
        return routing
    num_rows = len(routing.logits)
    is_flat = routing.rows_per_sample == 1 and num_rows > num_samples and num_rows % num_samples == 0
    return replace(routing, rows_per_sample=num_rows // num_samples) if is_flat else routing

"""Check of training streams that an analysis in the middle of an epoch would read away from the training."""

from collections.abc import Iterator
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils._pytree import tree_leaves
from torch.utils.data import IterableDataset

from moe_heads.callbacks._shared.trainer_access import uncombined

__all__ = ["check_streams"]


def check_streams(loaders: Any, owner: str) -> None:
    """Check that the training data can be read again while the training reads them.

    A stream that is its own iterator has one position only. The training would continue behind the samples of the
    analysis, or start again. Worker processes have copies of the stream, which an analysis cannot move.

    Args:
        loaders: The training loader or collection of loaders.
        owner: Name of the callback in messages.

    Raises:
        MisconfigurationException: If a training data set is its own iterator and is read without workers.
    """
    for loader in tree_leaves(uncombined(loaders)):
        dataset = getattr(loader, "dataset", None)
        is_own_iterator = isinstance(dataset, IterableDataset) and isinstance(dataset, Iterator)
        if is_own_iterator and not getattr(loader, "num_workers", 0):
            raise MisconfigurationException(
                f"{owner}(every_n_train_steps=...): expected training data whose __iter__ returns a new iterator, got"
                f" {type(dataset).__name__}, which is its own iterator. Reading samples for an analysis would move the"
                " training to another position of the stream. Write __iter__ as a generator, or use splits=['val']."
            )

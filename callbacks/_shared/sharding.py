"""Analyses under strategies that divide the parameters among the processes."""

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from moe_heads.analysis._shared.batch_list import Batches
from moe_heads.analysis._shared.digest import digest_of
from moe_heads.analysis._shared.ranks import Ranks
from moe_heads.analysis._shared.shards import CHECKPOINT_REMEDY, is_sharded, reshard
from moe_heads.callbacks._shared.options import OnError, Weights
from moe_heads.callbacks._shared.trainer_access import is_model_parallel, tensor_parallel_size
from moe_heads.callbacks._shared.trainer_access import is_sharded as has_sharded_strategy

__all__ = ["batches_in_step", "check_deterministic", "is_left_out", "key_over_ranks"]


def is_left_out(trainer: Trainer, owner: str, weights: Weights, unsupported: str, on_error: OnError) -> bool:
    """Return whether an analysis cannot run under the strategy of the trainer, with a warning that gives the reason.

    Args:
        trainer: The trainer.
        owner: Name of the callback.
        weights: Option of the callback.
        unsupported: Reason why the analysis does not support sharded parameters, or "".
        on_error: Option of the callback.

    Raises:
        MisconfigurationException: If the strategy supports no analysis, or ``on_error`` is "raise".
    """
    if not has_sharded_strategy(trainer):
        return False
    strategy = type(trainer.strategy).__name__
    if not is_model_parallel(trainer):
        raise MisconfigurationException(
            f"{owner}: expected a strategy with the whole model in every process, or ModelParallelStrategy with"
            f" fully_shard, got {strategy}. Train with one of them, or analyze a checkpoint of this run in a second"
            " script."
        )
    if tensor_parallel_size(trainer) > 1:
        unsupported = f"the parameters are also divided by tensor_parallel_size={tensor_parallel_size(trainer)}"
    elif weights == "best":
        unsupported = "weights='best' would load a checkpoint into the sharded module. Analyze weights='last'"
    if not unsupported:
        return False
    message = f"{owner}: left out under {strategy}: {unsupported}. {CHECKPOINT_REMEDY}."
    if on_error == "raise":
        raise MisconfigurationException(message)
    rank_zero_warn(message)
    return True


def batches_in_step(model: nn.Module, share: Batches | None, ranks: Ranks) -> Batches | None:
    """Return the share of this rank, with the same number of batches on all ranks if the model is sharded.

    Batches that cannot be divided among the ranks are left out at the end, with a warning.

    Args:
        model: The model.
        share: The share of this rank, None if a rank would get no samples.
        ranks: The processes.

    Raises:
        MisconfigurationException: If a rank of a sharded model gets no samples.
    """
    if ranks.size == 1 or not is_sharded(model):
        return share
    if share is None:
        raise MisconfigurationException(
            f"{ranks.name}: expected samples for each of the {ranks.size} ranks of a sharded model, got too few batches"
            " that can be divided. Raise num_samples."
        )
    number = min(ranks.gather(len(share)))
    kept = Batches(share[:number], share.sizes[:number], may_cut=share.may_cut)
    num_lost = sum(ranks.gather(share.num_samples - kept.num_samples))
    if num_lost:
        rank_zero_warn(
            f"{ranks.name}: {num_lost} samples are left out, because all ranks of a sharded model need the same number"
            " of batches. Pass a multiple of the number of ranks as num_samples and batch_size."
        )
    return kept


def check_deterministic(model: nn.Module, ranks: Ranks, *, is_random: bool) -> None:
    """Check that the loss of a sharded model draws no random numbers, so that its samples can be divided.

    Raises:
        MisconfigurationException: If it draws random numbers.
    """
    if is_random and ranks.size > 1 and is_sharded(model):
        raise MisconfigurationException(
            f"{ranks.name}: expected a loss of a sharded model that draws no random numbers, got one that does. Its"
            f" samples cannot be divided among the ranks. {CHECKPOINT_REMEDY}."
        )


def key_over_ranks(model: nn.Module, key: bytes, ranks: Ranks) -> bytes:
    """Return a fingerprint that includes the parameters of all ranks if the model is sharded."""
    if not is_sharded(model):
        return key
    reshard(model)
    return digest_of([key, *ranks.gather(digest_of(model.parameters()))])

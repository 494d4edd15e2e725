"""Learning-rate schedules over a whole training, as Lightning takes them."""

from typing import Any, Literal, TypedDict, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

__all__ = ["SCHEDULES", "Schedule", "schedule_config"]

Schedule = Literal["cosine", "linear", "constant"]
"""``cosine``: lowered to 0 over the epochs, one step an epoch. ``linear``: raised in the first fifth of the training,
then lowered to 0, both in a straight line, one step a batch. ``constant``: kept."""

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

_WARMUP_SHARE = 0.2


class ScheduleConfig(TypedDict):
    """A scheduler, and whether it steps each "epoch" or each "step"."""

    scheduler: LRScheduler
    interval: str


def schedule_config(schedule: Schedule, optimizer: Optimizer, trainer: Trainer) -> ScheduleConfig:
    """The scheduler of that name, one that is not constant, for the length of the trainer's training.

    Raises:
        MisconfigurationException: If the schedule ends with the training and the training has no end.
    """
    if schedule == "cosine":
        max_epochs = trainer.max_epochs
        if max_epochs is None or max_epochs < 0:
            raise _without_end(schedule, "max_epochs", max_epochs)
        return {"scheduler": CosineAnnealingLR(optimizer, T_max=max(max_epochs, 1)), "interval": "epoch"}
    num_steps = trainer.estimated_stepping_batches
    if num_steps == float("inf"):
        raise _without_end(schedule, "max_epochs or max_steps", trainer.max_epochs)
    return {"scheduler": LambdaLR(optimizer, _LinearRate(int(num_steps))), "interval": "step"}


class _LinearRate:
    """Share of the largest rate at a step: 1 at a fifth of the steps, 0 after the last; never 0 at a step taken."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.peak = max(round(_WARMUP_SHARE * num_steps), 1)

    def __call__(self, step: int) -> float:
        rising = (step + 1) / self.peak
        falling = (self.num_steps - step) / (self.num_steps - self.peak + 1)
        return max(min(rising, falling), 0.0)


def _without_end(schedule: str, limit: str, came: Any) -> MisconfigurationException:
    return MisconfigurationException(
        f'schedule="{schedule}" ends with the training: give the Trainer a finite {limit} (got {came}), or use'
        ' schedule="constant"'
    )

"""Learning-rate schedules over a whole training, in the format of Lightning."""

from typing import Any, Literal, TypedDict, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

__all__ = ["SCHEDULES", "Schedule", "schedule_config"]

Schedule = Literal["cosine", "linear", "constant"]
"""Name of a schedule. ``cosine`` lowers the rate to 0 over the epochs, one step per epoch. ``linear`` raises it
linearly in the first fifth of the training, then lowers it linearly to 0, one step per batch. ``constant`` keeps it."""

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

_WARMUP_SHARE = 0.2


class ScheduleConfig(TypedDict):
    """Scheduler with its interval, "epoch" or "step"."""

    scheduler: LRScheduler
    interval: str


def schedule_config(schedule: Schedule, optimizer: Optimizer, trainer: Trainer) -> ScheduleConfig:
    """Build the scheduler of a given name, other than "constant", for the length of the training.

    Raises:
        MisconfigurationException: If the length of the training is infinite.
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
    """Factor of the learning rate by step: 1 after a fifth of the steps, 0 after the last, never 0 at a step taken."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.peak = max(round(_WARMUP_SHARE * num_steps), 1)

    def __call__(self, step: int) -> float:
        rising = (step + 1) / self.peak
        falling = (self.num_steps - step) / (self.num_steps - self.peak + 1)
        return max(min(rising, falling), 0.0)


def _without_end(schedule: str, limit: str, came: Any) -> MisconfigurationException:
    return MisconfigurationException(
        f'schedule: expected a finite {limit} with "{schedule}", got {came}. Pass it to the Trainer, or use'
        ' schedule="constant".'
    )

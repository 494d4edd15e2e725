"""Access to a Trainer of transformers from one of its callbacks, and to its private parts, in this file only."""

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

from moe_heads.analysis._shared.interrupts import HeldInterrupts
from moe_heads.analysis._shared.state import snapshot

__all__ = [
    "TensorBoardWriters",
    "calling_trainer",
    "collator_of",
    "model_of",
    "muted_trainer",
    "reason_to_leave_out",
    "sampler_of",
    "without_autocast",
    "writers_of",
]


def calling_trainer(callback: TrainerCallback) -> tuple[Trainer | None, Path | None]:
    """Return the Trainer that is calling a hook of a callback, and the folder of the checkpoint that it resumes.

    The hooks are not given the Trainer. It is found on the stack: the object of the closest calling method that is a
    Trainer with this callback among its callbacks.

    Args:
        callback: The callback.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and any(each is callback for each in found.callback_handler.callbacks):
            resumed = frame.f_locals.get("resume_from_checkpoint")
            return found, Path(resumed) if isinstance(resumed, str) else None
    return None, None


def model_of(trainer: Trainer) -> nn.Module:
    """Return the model of a Trainer, outside of the wrappers of several processes."""
    assert trainer.model is not None
    return trainer.model


def collator_of(trainer: Trainer) -> Any:
    """Return the collator of a Trainer, which removes the columns that the model does not take."""
    return trainer._get_collator_with_removed_columns(trainer.data_collator)


def sampler_of(trainer: Trainer) -> Any | None:
    """Return the sampler of the training data by a subclass. Those of the Trainer itself order all samples."""
    is_own = type(trainer)._get_train_sampler is not Trainer._get_train_sampler
    return trainer._get_train_sampler(trainer.train_dataset) if is_own else None


def reason_to_leave_out(trainer: Trainer) -> str | None:
    """Return the reason why no process has the whole model as one module on one device, with a remedy, or None."""
    model = model_of(trainer)
    kind = str(getattr(trainer.accelerator.distributed_type, "value", trainer.accelerator.distributed_type))
    is_sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    remedy = "Train with DistributedDataParallel (torchrun), or analyze a checkpoint of this run in a second script."
    if is_sharded or (kind != "NO" and not kind.startswith("MULTI_")):
        return f"expected a model that is whole in every process, got one sharded by {kind}. {remedy}"
    if len(devices) > 1:
        return f"expected a model on one device, got one on {', '.join(sorted(devices))}. {remedy}"
    if trainer.args.n_gpu > 1:
        return f"expected one GPU for each process, got DataParallel on {trainer.args.n_gpu}. {remedy}"
    return None


def writers_of(trainer: Trainer) -> list[Any]:
    """Return the SummaryWriter and the W&B run that the Trainer reports to."""
    writers: list[Any] = []
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            writers.append(callback.tb_writer)
        elif isinstance(callback, WandbCallback) and getattr(callback._wandb, "run", None) is not None:
            writers.append(callback._wandb.run)
    return writers


class TensorBoardWriters:
    """Writers of the callbacks for TensorBoard, which forget them at the end of the training, before the analyses.

    Args:
        trainer: The Trainer, during its training.
    """

    def __init__(self, trainer: Trainer) -> None:
        callbacks = trainer.callback_handler.callbacks
        self._writers = {each: each.tb_writer for each in callbacks if isinstance(each, TensorBoardCallback)}

    @contextmanager
    def reopened(self) -> Iterator[None]:
        """Return the writers to the callbacks that have forgotten them while the block runs.

        A callback without its writer would open one in its default folder.
        """
        ended = {
            each: writer for each, writer in self._writers.items() if each.tb_writer is None and writer is not None
        }
        try:
            for each, writer in ended.items():
                each.tb_writer = writer
            yield
        finally:
            for each, writer in ended.items():
                writer.close()
                each.tb_writer = None


@contextmanager
def muted_trainer(trainer: Trainer) -> Iterator[None]:
    """Discard what the loss of a subclass of the Trainer logs and collects while the block runs.

    Such a loss may call ``log``, or append numbers to lists of the Trainer, for the mean that it logs next. Numbers and
    containers among the attributes of the Trainer are restored.

    Args:
        trainer: The Trainer.
    """
    attributes: dict[str, Any] = vars(trainer)
    datasets = {id(attributes.get("train_dataset")), id(attributes.get("eval_dataset"))}
    kinds = (bool, int, float, dict, list, deque, set)
    held = {name: value for name, value in attributes.items() if isinstance(value, kinds) and id(value) not in datasets}
    model = model_of(trainer)
    known = {id(each) for each in (*model.modules(), *model.parameters(), *model.buffers())}
    restore = snapshot(held, known=known)
    own = {"log": attributes["log"]} if "log" in attributes else {}
    try:
        attributes["log"] = _ignore
        yield
    finally:
        with HeldInterrupts():
            del attributes["log"]
            attributes.update({**restore(), **own})


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Run the model's own forward, which accelerate wraps in autocast for ``bf16=True`` and ``fp16=True``.

    Args:
        model: The model.
    """
    attributes = vars(model)
    if "_original_forward" not in attributes or "forward" not in attributes:
        yield
        return
    wrapped = attributes["forward"]
    try:
        attributes["forward"] = attributes["_original_forward"]
        yield
    finally:
        attributes["forward"] = wrapped


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Replace ``log`` by no operation."""

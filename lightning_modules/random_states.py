"""Callback that saves the random number generators in each checkpoint."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from typing_extensions import override

__all__ = ["RandomStates"]


class RandomStates(Callback):
    """Callback that saves the random number generators, so that a resumed training equals an uninterrupted one.

    It saves the generators of Python, NumPy and torch, on the CPU and on every CUDA device, when a ``ModelCheckpoint``
    writes. A training resumed from the checkpoint at the end of an epoch (``ModelCheckpoint(save_last=True,
    save_on_train_epoch_end=True)``) then has the same shuffling, augmentation and dropout, bit for bit if the
    arithmetic is deterministic. Only one process is supported. Loaders with workers have generators of their own.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RandomStates()], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    @override
    def state_dict(self) -> dict[str, Any]:
        version, words, gauss_next = random.getstate()
        name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
        return {
            # plain numbers and tensors, so that the checkpoint loads with weights_only=True
            "python": [version, list(words), gauss_next],
            "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        version, words, gauss_next = state_dict["python"]
        random.setstate((version, tuple(words), gauss_next))
        name, keys, position, has_gauss, gauss = state_dict["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
        torch.set_rng_state(state_dict["torch"])
        if len(state_dict["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state_dict["cuda"])

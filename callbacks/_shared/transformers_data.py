"""Data of a Trainer of transformers, read without any effect on the training."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from moe_heads.analysis._shared.generators import generators_kept
from moe_heads.analysis._shared.state import snapshot
from moe_heads.callbacks._shared.trainer_access import Split
from moe_heads.callbacks._shared.training_analysis import TrainingAnalysis
from moe_heads.callbacks._shared.transformers_access import collator_of, sampler_of
from moe_heads.callbacks._shared.transformers_loss import has_own_loss

__all__ = ["TransformersData"]


class TransformersData:
    """Loaders of the data sets of a Trainer, with its collator, batch size and columns.

    The Trainer's own loaders are not used, since a new iterator would draw from the generators of the training. A
    subclass with a sampler or a training loader of its own decides which samples there are.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Any = trainer

    def loader_of(self, split: Split) -> DataLoader[Any] | dict[str, DataLoader[Any]] | None:
        """Return the loader of a split, a dict of loaders for a dict of data sets, or None."""
        trainer, args = self._trainer, self._trainer.args
        if split == "train":
            own = trainer.callback_handler.train_dataloader
            if type(trainer).get_train_dataloader is not Trainer.get_train_dataloader and own is not None:
                return _unsharded(own)
            return self._loader(trainer.train_dataset, args.per_device_train_batch_size, sampler_of(trainer))
        if split == "test":
            return None
        own = trainer.callback_handler.eval_dataloader
        if type(trainer).get_eval_dataloader is not Trainer.get_eval_dataloader and own is not None:
            return _unsharded(own)
        size = args.per_device_eval_batch_size
        if isinstance(trainer.eval_dataset, dict):
            loaders = {name: self._loader(dataset, size) for name, dataset in trainer.eval_dataset.items()}
            return {name: loader for name, loader in loaders.items() if loader is not None} or None
        return self._loader(trainer.eval_dataset, size)

    def check_labels(self, analyses: Sequence[TrainingAnalysis]) -> None:
        """Check one sample of each split before the training.

        Args:
            analyses: The analyses.

        Raises:
            MisconfigurationException: If an analysis needs the model's loss, and the samples have no labels.
        """
        if has_own_loss(self._trainer) or self._trainer.compute_loss_func is not None:
            return
        for analysis in analyses:
            if not analysis.needs_loss or analysis.loss_fn is not None or not analysis.runs_in_fit:
                continue
            for split in analysis.splits:
                candidates = (split, *analysis.fallbacks.get(split, ()))
                found = next((each for each in candidates if self.loader_of(each) is not None), None)
                if found is not None:
                    self._check_labels(found, type(analysis).__name__)

    def _check_labels(self, split: Split, owner: str) -> None:
        batch, names = self._first_sample(split), self._trainer.label_names
        if not isinstance(batch, Mapping) or not names or any(batch.get(name) is not None for name in names):
            return
        raise MisconfigurationException(
            f"{'train' if split == 'train' else 'eval'}_dataset: expected batches with {' or '.join(map(repr, names))},"
            f" from which {type(self._trainer.model).__name__} computes its loss, got only {list(batch)}. Add labels,"
            " for a causal language model with data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), or"
            f" pass {owner}(loss_fn=lambda model, batch: ...)."
        )

    def _first_sample(self, split: Split) -> Any | None:
        """Return a batch of the first sample; None for data that cannot be read twice or have other keys."""
        loader = self.loader_of(split)
        if isinstance(loader, dict):
            loader = next(iter(loader.values()))
        assert loader is not None
        dataset: Any = loader.dataset
        with generators_kept(), self.generators_fixed():
            if isinstance(dataset, IterableDataset):
                samples = [] if isinstance(dataset, Iterator) else [next(iter(dataset), None)]
            else:
                try:
                    samples = [dataset[0]]
                except (IndexError, KeyError, TypeError):
                    return None
            return loader.collate_fn(samples) if samples and samples[0] is not None else None

    @contextmanager
    def generators_fixed(self) -> Iterator[None]:
        """Restore the random number generators of the data sets and of the collator at the end of the block.

        A collator of transformers with a seed creates its generator for the first batch. In the block it starts from
        this seed again, so that every analysis has the same samples.
        """
        collator = self._trainer.data_collator
        kinds = (torch.Generator, np.random.Generator, random.Random)
        sources = [collator, self._trainer.train_dataset, self._trainer.eval_dataset]
        held = [value for source in sources for value in _vars_of(source).values() if isinstance(value, kinds)]
        restore = [snapshot(generator) for generator in held]
        is_seeded = "generator" in _vars_of(collator) and getattr(collator, "seed", None) is not None
        own = getattr(collator, "generator", None)
        try:
            if is_seeded:
                collator.generator = None
            yield
        finally:
            if is_seeded:
                collator.generator = own
            for put_back in restore:
                put_back()

    def _loader(self, dataset: Any, size: int, sampler: Any = None) -> DataLoader[Any] | None:
        if dataset is None:
            return None
        options: dict[str, Any] = {} if isinstance(dataset, IterableDataset) else {"sampler": sampler}
        collate, workers = collator_of(self._trainer), self._trainer.args.dataloader_num_workers
        return DataLoader(dataset, batch_size=size, collate_fn=collate, num_workers=workers, **options)


def _vars_of(source: Any) -> dict[str, Any]:
    """Return the attributes of an object, none for objects without a dict."""
    return getattr(source, "__dict__", {})


def _unsharded(loader: Any) -> DataLoader[Any]:
    """Return a loader of all batches for one that gives each process its part."""
    batches = getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler)
    if batches is None or isinstance(loader.dataset, IterableDataset):
        return DataLoader(loader.dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn)
    return DataLoader(loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn)

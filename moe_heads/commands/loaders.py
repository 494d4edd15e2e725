"""Loaders by split from a function, a data module or its class."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader

from moe_heads.analysis._shared.analysis_mode import analysis_mode
from moe_heads.analysis._shared.batches import to_device
from moe_heads.analysis._shared.environment import device_of
from moe_heads.callbacks._shared.trainer_access import Split
from moe_heads.commands.errors import CommandError, one_sentence
from moe_heads.commands.import_names import import_object

__all__ = ["Loaders", "check_loss", "load_data", "loaders_for"]

Loaders = dict[Split, Any]
"""A loader, or another iterable of batches, by split."""

_SPLITS: tuple[Split, ...] = get_args(Split)


def load_data(name: str) -> Loaders:
    """Return the loaders of each split.

    Args:
        name: Import name of a function, or of a class of data modules. It returns a loader (of the split "train"), a
            mapping from "train", "val" and "test" to loaders, or a data module.

    Raises:
        CommandError: If it fails or returns something else.
    """
    maker = import_object("--data", name)
    if not callable(maker):
        raise CommandError(f"--data: expected a function or a class of data modules, got {name} = {maker!r}.")
    try:
        data = maker()
        if hasattr(data, "train_dataloader") and hasattr(data, "setup"):
            return _of_module(data)
    except Exception as error:
        raise CommandError(
            f"--data: expected {name}() to return data, got {type(error).__name__}: {one_sentence(error)}"
        ) from error
    if isinstance(data, Mapping):
        unknown = [key for key in data if key not in _SPLITS]
        if unknown or not data:
            raise CommandError(f"--data: expected a mapping with some of {', '.join(_SPLITS)}, got {list(data)}.")
        return dict(data)
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes, Tensor)):
        return {"train": data}
    raise CommandError(
        f"--data: expected {name}() to return a loader, a mapping from split to loader, or a data module, got"
        f" {type(data).__name__}."
    )


def loaders_for(splits: Iterable[Split], fallbacks: Mapping[Split, Iterable[Split]], loaders: Loaders) -> Loaders:
    """Return the loaders that an analysis of these splits uses, as it would under a Trainer."""
    found: Loaders = {}
    for split in splits:
        for candidate in (split, *fallbacks.get(split, ())):
            if candidate in loaders:
                found[candidate] = loaders[candidate]
                break
    return found


def check_loss(model: nn.Module, loss_fn: Callable[[nn.Module, Any], Any], loaders: Loaders) -> None:
    """Compute the loss of the first batch of each split, before any long work.

    Raises:
        CommandError: If it fails, for example for data without labels.
    """
    for split, loader in loaders.items():
        with analysis_mode(model):
            batch = next(iter(loader), None)
            if batch is None:
                raise CommandError(f"--data: expected at least one batch of {split} data, got an empty loader.")
            try:
                loss_fn(model, to_device(batch, device_of(model)))
            except Exception as error:
                leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
                lacks = (
                    f", which has no labels (one tensor of shape {tuple(leaves[0].shape)})" if len(leaves) == 1 else ""
                )
                raise CommandError(
                    f"--data: expected {split} batches with which the loss can be computed, got a"
                    f" {type(batch).__name__}{lacks}: {type(error).__name__}: {one_sentence(error)}"
                ) from error


def _of_module(module: Any) -> Loaders:
    module.prepare_data()
    found: Loaders = {}
    splits: tuple[tuple[Split, str], ...] = (("train", "fit"), ("val", "fit"), ("test", "test"))
    ready: set[str] = set()
    for split, stage in splits:
        if not is_overridden(f"{split}_dataloader", module):
            continue
        if stage not in ready:
            module.setup(stage)
            ready.add(stage)
        found[split] = _without_augmentation(module, split, getattr(module, f"{split}_dataloader")())
    return found


def _without_augmentation(module: Any, split: Split, loader: Any) -> Any:
    """Return a loader of the data set that the module offers for analyses, if it does."""
    offer = getattr(module, "analysis_dataset", None)
    if offer is None or not isinstance(loader, DataLoader):
        return loader
    options: dict[str, Any] = {"collate_fn": loader.collate_fn, "num_workers": loader.num_workers}
    if type(loader.batch_sampler) is BatchSampler:
        options |= {"batch_size": loader.batch_size, "sampler": loader.sampler, "drop_last": loader.drop_last}
    else:
        options["batch_sampler"] = loader.batch_sampler
    return DataLoader(offer(split), **options)

"""Models inside the wrappers of DistributedDataParallel, torch.compile and Fabric."""

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from moe_heads.callbacks._shared.trainer_access import inside_fabric

__all__ = ["unwrapped"]


def unwrapped(model: nn.Module) -> tuple[nn.Module, dist.ProcessGroup | None]:
    """Return the user's own module, and the process group if it is trained by several processes.

    An analysis of the module itself has no side effects on the wrapper: no gradient is reduced, no code compiled.

    Args:
        model: A module, which may be wrapped several times.
    """
    group: dist.ProcessGroup | None = None
    while True:
        inner: Any = inside_fabric(model)
        if inner is None and isinstance(model, (DistributedDataParallel, DataParallel)):
            inner = model.module
            if isinstance(model, DistributedDataParallel) and dist.get_world_size(model.process_group) > 1:
                group = model.process_group
        if inner is None:
            # torch.compile(model) is a module with the model as its child; its class is not public
            inner = dict(model.named_children()).get("_orig_mod")
        if inner is None:
            return model, group
        model = inner

"""Whether a forward pass is a first one, or gradient checkpointing's second one inside backward."""

import torch

__all__ = ["in_backward"]


def in_backward() -> bool:
    """Whether the autograd engine runs this code: what counts batches must not count them twice."""
    if torch.compiler.is_compiling():
        return False
    # torch.utils.checkpoint asks the same question in the same way; there is no public one
    return torch._C._current_graph_task_id() != -1

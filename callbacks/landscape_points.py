"""Where a landscape callback keeps its points and eigenvectors from one run to the next."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_heads.analysis._shared.digest import digest_of
from moe_heads.analysis._shared.function_identity import code_of
from moe_heads.analysis.loss_landscape.stored import damaged, read_arrays, write_arrays
from moe_heads.callbacks._shared.inputs import AnalysisInputs

__all__ = ["kept_eigenvectors", "points_file"]

# Of a digest in the name of a file: two of a million files are the same with a probability below 1e-7.
_NUM_DIGITS = 16

# What a module may compute its loss and accuracy by.
_METHODS = ("analysis_loss", "analysis_accuracy", "training_step", "forward")


def points_file(folder: Path, inputs: AnalysisInputs, part: str, depends_on: Iterable[Any]) -> Path:
    """A file of its own for each model, sample and number of ranks, for the code of the loss, and what else there is.

    So the points of another epoch, training or option lie beside these, and a run of the same finds its own.

    Args:
        folder: Of the callback.
        inputs: Their key stands for the weights and the sample.
        part: Beginning of the name.
        depends_on: Directions, or what they are made of.
    """
    functions = [inputs.loss_fn, *(getattr(inputs.model, name, None) for name in _METHODS)]
    digest = digest_of([inputs.key, inputs.ranks.size, *map(code_of, functions), *depends_on])
    return folder / inputs.split / f"{part}_{digest.hex()[:_NUM_DIGITS]}.npz"


def kept_eigenvectors(file: Path, inputs: AnalysisInputs, compute: Callable[[], Tensor]) -> Tensor:
    """Those in the file of rank zero; where there is none what is computed, which is written.

    Computed once more they would differ by rounding, and the points along them would be of no use.

    Returns:
        The eigenvectors, (number, P), float64 where they were computed so, else float32.

    Raises:
        ValueError: If the file is damaged.
    """
    found = inputs.ranks.run_on_rank_zero(lambda: _read(file))
    if found is None:
        found = compute()
        found = found.detach().cpu().to(torch.float64 if found.dtype == torch.float64 else torch.float32)
        arrays = {"eigenvectors": found.numpy()}
        inputs.ranks.run_on_rank_zero(lambda: write_arrays(file, arrays))
    return found


def _read(file: Path) -> Tensor | None:
    arrays = read_arrays(file)
    if arrays is None:
        return None
    if "eigenvectors" not in arrays:
        raise damaged(file, KeyError("eigenvectors"))
    return torch.from_numpy(arrays["eigenvectors"])

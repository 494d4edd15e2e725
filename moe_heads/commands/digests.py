"""SHA-256 digests of files and of weights."""

import hashlib
from pathlib import Path

import torch
from torch import nn

__all__ = ["digest_of_file", "digest_of_weights"]


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_weights(model: nn.Module) -> str:
    """Return the SHA-256 digest of names, types, shapes and values of the state dict, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()

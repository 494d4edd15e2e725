"""Fastest training precision of a device."""

from typing import Literal

import torch

__all__ = ["fastest_precision"]

# bf16 multiplication on x86, by vectors and by tiles, with the names of `torch.cpu.get_capabilities`
_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")


def fastest_precision(device: torch.device | str) -> Literal["bf16-mixed", "32-true"]:
    """Return the precision for the Trainer with the fastest convolutions and matrix products on this device.

    It is mixed bf16 if the device has instructions to multiply bf16, else fp32. A processor without them converts
    each number. On two AVX-512 cores without them, the convolutions of `FastCNN` trained at 89 to 128 GFLOP/s in fp32
    and at 37 to 41 in bf16 (torch 2.15, ``examples/benchmarks/convolution_precision.py``).

    Args:
        device: A CPU or CUDA device of this machine. Other devices, and processors that are not x86, were not measured
            and get fp32.

    Example:
        >>> fastest_precision("cpu") in ("bf16-mixed", "32-true")
        True
    """
    kind = torch.device(device).type
    if kind == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities() if kind == "cpu" else {}
        has_bf16 = any(capabilities.get(name, False) for name in _BF16_INSTRUCTIONS)
    return "bf16-mixed" if has_bf16 else "32-true"

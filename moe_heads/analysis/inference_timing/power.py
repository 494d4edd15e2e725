"""Energy and clocks of an NVIDIA GPU, where its management library can be asked (the package nvidia-ml-py)."""

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Meter", "PowerUse"]


@dataclass(frozen=True)
class PowerUse:
    """What the GPU used while the rounds of one batch size ran, all modules together.

    Attributes:
        batch_size: Samples of the batch.
        seconds: Duration of the rounds.
        joules: Energy of the whole GPU.
        sm_mhz: Clock of the multiprocessors at the end.
        memory_mhz: Clock of the memory at the end.
        celsius: Temperature at the end.
    """

    batch_size: int
    seconds: float
    joules: float
    sm_mhz: int
    memory_mhz: int
    celsius: int


@dataclass
class Meter:
    """Reads energy and clocks; does nothing where the device or the library is not there.

    Args:
        device: The device.

    Attributes:
        uses: What was measured.
    """

    device: torch.device
    uses: list[PowerUse] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._nvml, self._handle = _handle(self.device)

    @contextmanager
    def measured(self, batch_size: int) -> Iterator[None]:
        """Measure what the block uses.

        Args:
            batch_size: Samples of the batch.
        """
        nvml, handle = self._nvml, self._handle
        if nvml is None:
            yield
            return
        start, before = time.perf_counter(), nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        yield
        joules = (nvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1e3
        self.uses.append(
            PowerUse(
                batch_size,
                time.perf_counter() - start,
                joules,
                sm_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                memory_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
                celsius=nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            )
        )


def _handle(device: torch.device) -> tuple[Any, Any]:
    """The library and its handle of the device; (None, None) where either is missing or cannot measure energy."""
    if device.type != "cuda":
        return None, None
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None, None
    try:
        nvml.nvmlInit()
        # the order of torch's devices may not be that of the library
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return None, None
    return nvml, handle

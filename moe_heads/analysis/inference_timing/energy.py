"""Energy and clock rates of an NVIDIA GPU, read through its management library (package nvidia-ml-py)."""

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["EnergyMeter", "PowerUse"]


@dataclass(frozen=True)
class PowerUse:
    """Duration and GPU energy of the rounds of one batch size, and clock rates and temperature at their end."""

    batch_size: int
    seconds: float
    joules: float
    sm_mhz: int
    memory_mhz: int
    celsius: int


class EnergyMeter:
    """Meter of energy and clock rates in ``uses``; it records nothing where the device or the library is missing."""

    def __init__(self, device: torch.device) -> None:
        self.uses: list[PowerUse] = []
        self._nvml, self._handle = _handle(device)

    @contextmanager
    def measure(self, batch_size: int) -> Iterator[None]:
        """Measure the energy of the enclosed block."""
        nvml, handle = self._nvml, self._handle
        if nvml is None:
            yield
            return
        start, before = time.perf_counter(), nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        yield
        joules = (nvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1e3
        seconds = time.perf_counter() - start
        sm_mhz, memory_mhz = (
            nvml.nvmlDeviceGetClockInfo(handle, kind) for kind in (nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM)
        )
        celsius = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        self.uses.append(PowerUse(batch_size, seconds, joules, sm_mhz, memory_mhz, celsius))


def _handle(device: torch.device) -> tuple[Any, Any]:
    """Return the library and its device handle, or (None, None) if energy cannot be measured."""
    if device.type != "cuda":
        return None, None
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None, None
    try:
        nvml.nvmlInit()
        # the library may order the devices differently from torch
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return None, None
    return nvml, handle

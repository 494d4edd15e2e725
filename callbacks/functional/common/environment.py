"""The machine and the settings under which a model runs."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

__all__ = ["Environment", "device_of", "environment_of", "synchronize"]


@dataclass(frozen=True)
class Environment:
    """What a measured time depends on besides the model.

    Attributes:
        device: Name of the processor or GPU that holds the model.
        device_type: "cpu", "cuda", ...
        dtype: Data type of the model's floating-point parameters; several are joined by "+".
        autocast: Data type of the autocast that was active, or "off".
        float32_matmul_precision: "highest", "high" (TF32) or "medium".
        num_threads: Threads of torch on the CPU.
        torch_version: Version of torch.
    """

    device: str
    device_type: str
    dtype: str
    autocast: str
    float32_matmul_precision: str
    num_threads: int
    torch_version: str

    def __str__(self) -> str:
        return (
            f"{self.device} ({self.device_type}), {self.dtype}, autocast {self.autocast}, matmul precision "
            f"{self.float32_matmul_precision}, {self.num_threads} threads, torch {self.torch_version}"
        )


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter or buffer; the CPU when it has neither."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def environment_of(model: nn.Module) -> Environment:
    """The environment of the model as it is at this moment."""
    device = device_of(model)
    dtypes = dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point())
    autocast = torch.is_autocast_enabled(device.type)
    return Environment(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        device_type=device.type,
        dtype="+".join(dtypes) or "none",
        autocast=str(torch.get_autocast_dtype(device.type)).removeprefix("torch.") if autocast else "off",
        float32_matmul_precision=torch.get_float32_matmul_precision(),
        num_threads=torch.get_num_threads(),
        torch_version=torch.__version__,
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all work queued so far; a CPU never lags."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"

"""Machine and settings under which a model runs."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

__all__ = ["Environment", "device_of", "environment_of", "load_average", "synchronize"]


@dataclass(frozen=True)
class Environment:
    """Hardware, software and settings that affect a measured time, apart from the model.

    Attributes:
        device: Name of the processor or GPU that holds the model.
        device_type: "cpu", "cuda", ...
        dtype: Data type of the model's floating-point parameters; several are joined by "+".
        autocast: Data type of the active autocast, or "off".
        float32_matmul_precision: "highest", "high" (TF32) or "medium".
        num_threads: Threads of torch on the CPU.
        torch_version: Version of torch.
        num_processors: Processors of the system, including those that this process may not use.
        load_average: Mean number of running or runnable processes over the last minute; None if the system does not
            report it.
        driver: Version of the GPU driver; "" without a GPU.
        python_version: Version of Python.
        cudnn_benchmark: Whether cuDNN selects its algorithms by benchmarking.
        deterministic: Whether torch uses deterministic algorithms.
    """

    device: str
    device_type: str
    dtype: str
    autocast: str
    float32_matmul_precision: str
    num_threads: int
    torch_version: str
    num_processors: int
    load_average: float | None
    driver: str
    python_version: str
    cudnn_benchmark: bool
    deterministic: bool

    def __str__(self) -> str:
        driver = f"driver {self.driver}, " if self.driver else ""
        load = "" if self.load_average is None else f", load {self.load_average:.2f}"
        return (
            f"{self.device} ({self.device_type}), {driver}{self.dtype}, autocast {self.autocast}, matmul precision "
            f"{self.float32_matmul_precision}, {self.num_threads} threads of {self.num_processors} processors{load}, "
            f"torch {self.torch_version}, Python {self.python_version}"
        )


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer, or the CPU if it has neither."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def environment_of(model: nn.Module) -> Environment:
    """Return the current environment of the model."""
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
        num_processors=os.cpu_count() or 1,
        load_average=load_average(),
        driver=_driver() if device.type == "cuda" else "",
        python_version=platform.python_version(),
        cudnn_benchmark=torch.backends.cudnn.benchmark,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def load_average() -> float | None:
    """Return the mean number of running or runnable processes over the last minute, None if it is not reported."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work; return at once on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _driver(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Return the version of the NVIDIA driver: the first number in the kernel's "... Module  580.65.06  ..."."""
    words = path.read_text(encoding="utf-8").split() if path.is_file() else []
    return next((word for word in words if word.replace(".", "").isdigit() and "." in word), "unknown")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"

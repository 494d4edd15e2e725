import platform
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_heads.analysis._shared import environment as module
from moe_heads.analysis._shared.environment import device_of, environment_of, load_average, synchronize


def test_device_of_parameters_of_buffers_and_of_nothing() -> None:
    assert device_of(nn.Linear(1, 1, device="meta")).type == "meta"
    assert device_of(nn.BatchNorm1d(1, affine=False, device="meta")).type == "meta"
    assert device_of(nn.ReLU()).type == "cpu"


def test_environment_names_the_machine_and_the_data_types() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, dtype=torch.bfloat16))
    environment = environment_of(model)
    assert environment.dtype == "float32+bfloat16"
    assert environment.autocast == "off"
    assert environment_of(nn.ReLU()).dtype == "none"
    assert torch.backends.cpu.get_cpu_capability() in environment.device
    for part in (environment.device, "float32+bfloat16", "autocast off", f"torch {torch.__version__}"):
        assert part in str(environment)


def test_a_cpu_needs_no_synchronization() -> None:
    synchronize(torch.device("cpu"))


def test_environment_names_versions_flags_and_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "getloadavg", lambda: (1.25, 0.0, 0.0))
    monkeypatch.setattr(module.os, "cpu_count", lambda: 6)
    environment = environment_of(nn.Linear(1, 1))
    assert environment.load_average == 1.25
    assert environment.python_version == platform.python_version()
    assert environment.driver == ""
    assert environment.cudnn_benchmark is torch.backends.cudnn.benchmark
    assert environment.deterministic is False
    assert f"{environment.num_threads} threads of 6 processors, load 1.25" in str(environment)


def test_a_system_without_load_average_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module.os, "getloadavg")
    assert load_average() is None
    assert "load" not in str(environment_of(nn.Linear(1, 1)))


def test_the_driver_version_is_read_from_the_kernel(tmp_path: Path) -> None:
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (x)")
    assert module._driver(version) == "580.65.06"
    assert module._driver(tmp_path / "none") == "unknown"

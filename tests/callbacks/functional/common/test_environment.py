import torch
from torch import nn

from moe_heads.callbacks.functional.common.environment import device_of, environment_of, synchronize


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


def test_a_cpu_needs_no_synchronisation() -> None:
    synchronize(torch.device("cpu"))

"""Fastest precision by the instructions of a device."""

import pytest
import torch

from moe_heads.lightning_modules import fastest_precision


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16-mixed"),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_vnni": True}, "32-true"),
        ({"neon": True, "bf16": True}, "32-true"),
    ],
)
def test_cpu_by_its_instructions(capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert fastest_precision("cpu") == expected


@pytest.mark.parametrize("has_bf16", [True, False])
def test_cuda_by_its_hardware_and_not_by_emulation(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def is_supported(including_emulation: bool = True) -> bool:
        asked["including_emulation"] = including_emulation
        return has_bf16

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert fastest_precision(torch.device("cuda", 0)) == ("bf16-mixed" if has_bf16 else "32-true")
    assert asked == {"including_emulation": False}


def test_an_unmeasured_device_trains_in_fp32() -> None:
    assert fastest_precision("meta") == "32-true"

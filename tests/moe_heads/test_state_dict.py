"""State dicts: stable names, the version, and the message for a newer version."""

import copy
from pathlib import Path

import pytest
import torch

from moe_heads import Dense, Head, SoftMoE, SparseMoE
from moe_heads.routers import BiasBalancedRouter

EXPERTS = {
    "weight1": (4, 8, 6),
    "bias1": (4, 8),
    "weight2": (4, 3, 8),
    "bias2": (4, 3),
}
GATE = {"router.gate.weight": (4, 6), "router.gate.bias": (4,)}
NOISE = {"router.noise.weight": (4, 6), "router.noise.bias": (4,)}
# A name or a shape in here is what people's checkpoints hold: it changes with Head._version and a conversion only.
FORMAT_2 = {
    "dense": {
        "layers.0.weight": (8, 6),
        "layers.0.bias": (8,),
        "layers.3.weight": (3, 8),
        "layers.3.bias": (3,),
    },
    "soft": GATE | {f"experts.{name}": shape for name, shape in EXPERTS.items()},
    "sparse": GATE | NOISE | {f"experts.{name}": shape for name, shape in EXPERTS.items()},
    "shared": GATE
    | NOISE
    | {f"experts.{name}": shape for name, shape in EXPERTS.items()}
    | {f"shared.{name}": (2, *shape[1:]) for name, shape in EXPERTS.items()},
    "bias_balanced": GATE
    | {"router.bias_steps": (4,), "router.pending_counts": (4,)}
    | {f"experts.{name}": shape for name, shape in EXPERTS.items()},
}


def build(name: str) -> Head:
    sizes = {"num_experts": 4, "expert_width": 8}
    return {
        "dense": lambda: Dense(6, 3, width=8),
        "soft": lambda: SoftMoE(6, 3, **sizes),
        "sparse": lambda: SparseMoE(6, 3, **sizes),
        "shared": lambda: SparseMoE(6, 3, **sizes, num_shared_experts=2),
        "bias_balanced": lambda: SparseMoE(6, 3, **sizes, router=BiasBalancedRouter(6, 4)),
    }[name]()


@pytest.mark.parametrize("name", list(FORMAT_2))
def test_names_and_shapes_are_those_of_format_2(name: str) -> None:
    assert {key: tuple(value.shape) for key, value in build(name).state_dict().items()} == FORMAT_2[name]
    assert Head._version == 2


@pytest.mark.parametrize("name", list(FORMAT_2))
def test_round_trip_through_a_file(name: str, tmp_path: Path) -> None:
    head, other = build(name).eval(), build(name).eval()
    x = torch.randn(4, 6)
    assert not torch.equal(head(x), other(x))
    torch.save(head.state_dict(), tmp_path / "head.pt")
    state = torch.load(tmp_path / "head.pt", weights_only=True)
    assert state._metadata[""]["version"] == 2
    other.load_state_dict(state)
    assert torch.equal(head(x), other(x))


def test_a_newer_format_is_named() -> None:
    model = torch.nn.Sequential(build("sparse"))
    state = model.state_dict()
    state._metadata["0"]["version"] = 3
    with pytest.raises(RuntimeError, match=r"0\.: expected a state dict of format 2 or older, got format 3, which"):
        model.load_state_dict(state)


def test_a_state_dict_without_metadata_loads() -> None:
    head = build("sparse")
    build("sparse").load_state_dict(dict(head.state_dict()))


@pytest.mark.parametrize("name", list(FORMAT_2))
def test_repr_tells_the_sizes(name: str) -> None:
    text = repr(build(name))
    total = sum(p.numel() for p in build(name).parameters())
    assert f"in_features=6, num_classes=3, parameters={total:,}, active=" in text
    if name != "dense":
        assert "num_experts=4, in_features=6, width=8, out_features=3" in text


@pytest.mark.parametrize("name", list(FORMAT_2))
def test_a_head_that_was_built_without_memory_starts_like_any_other(name: str) -> None:
    with torch.device("meta"):
        empty = build(name)
    head = empty.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in head.state_dict().values():
            tensor.fill_(7)
    torch.manual_seed(3)
    for module in head.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    state = head.state_dict()
    assert all(value.abs().max() < 1 for value in state.values())
    assert all(not state[name].any() for name in state if "noise" in name or "bias_steps" in name)


@pytest.mark.parametrize("name", list(FORMAT_2))
def test_deepcopy_is_independent(name: str) -> None:
    head = build(name).eval()
    twin = copy.deepcopy(head)
    x = torch.randn(4, 6)
    expected = head(x)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    assert torch.equal(twin(x), expected)

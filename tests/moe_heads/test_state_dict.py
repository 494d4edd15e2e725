"""State dicts: stable names, the version, and the message for a newer version."""

import copy
import warnings
from pathlib import Path

import pytest
import torch

from moe_heads import NOISY_TOP_K, Dense, Head, SoftMoE, SparseMoE
from moe_heads.routers import BiasBalancedRouter

EXPERTS = {
    "fc1.weight": (4, 8, 6),
    "fc1.bias": (32,),
    "fc2.weight": (4, 3, 8),
    "fc2.bias": (12,),
}
SHARED = {
    "shared.fc1.weight": (2, 8, 6),
    "shared.fc1.bias": (16,),
    "shared.fc2.weight": (2, 3, 8),
    "shared.fc2.bias": (6,),
}
GATE = {"router.gate.weight": (4, 6), "router.gate.bias": (4,)}
NOISE = {"router.noise.weight": (4, 6), "router.noise.bias": (4,)}
# A name or a shape in here is what people's checkpoints hold: it changes with Head._version and a conversion only.
FORMAT_3 = {
    "dense": {
        "layers.0.weight": (8, 6),
        "layers.0.bias": (8,),
        "layers.3.weight": (3, 8),
        "layers.3.bias": (3,),
    },
    "soft": GATE | {f"experts.{name}": shape for name, shape in EXPERTS.items()},
    "sparse": GATE | SHARED | {f"experts.{name}": shape for name, shape in EXPERTS.items()},
    "noisy_top_k": GATE | NOISE | {f"experts.{name}": shape for name, shape in EXPERTS.items()},
    "bias_balanced": GATE
    | {"router.bias_steps": (4,), "router.pending_counts": (4,)}
    | SHARED
    | {f"experts.{name}": shape for name, shape in EXPERTS.items()},
}


def build(name: str) -> Head:
    sizes = {"num_experts": 4, "expert_width": 8}
    return {
        "dense": lambda: Dense(6, 3, width=8),
        "soft": lambda: SoftMoE(6, 3, **sizes),
        "sparse": lambda: SparseMoE(6, 3, **sizes),
        "noisy_top_k": lambda: SparseMoE(6, 3, **sizes, **NOISY_TOP_K),
        "bias_balanced": lambda: SparseMoE(6, 3, **sizes, router=BiasBalancedRouter(6, 4)),
    }[name]()


@pytest.mark.parametrize("name", list(FORMAT_3))
def test_names_and_shapes_are_those_of_format_3(name: str) -> None:
    assert {key: tuple(value.shape) for key, value in build(name).state_dict().items()} == FORMAT_3[name]
    assert Head._version == 3


@pytest.mark.parametrize("name", list(FORMAT_3))
def test_round_trip_through_a_file(name: str, tmp_path: Path) -> None:
    head, other = build(name).eval(), build(name).eval()
    x = torch.randn(4, 6)
    assert not torch.equal(head(x), other(x))
    torch.save(head.state_dict(), tmp_path / "head.pt")
    state = torch.load(tmp_path / "head.pt", weights_only=True)
    assert state._metadata[""]["version"] == 3
    other.load_state_dict(state)
    assert torch.equal(head(x), other(x))


def test_a_newer_format_is_named() -> None:
    model = torch.nn.Sequential(build("sparse"))
    state = model.state_dict()
    state._metadata["0"]["version"] = 4
    with pytest.raises(RuntimeError, match=r"0\.: expected a state dict of format 3 or older, got format 4, which"):
        model.load_state_dict(state)


def in_format_2(head: Head) -> dict[str, torch.Tensor]:
    """The state dict as version 2 wrote it: other names, biases (E, H) and (E, C), whole numbers of steps."""
    old = {}
    for name, value in head.state_dict().items():
        for layer in ("1", "2"):
            name = name.replace(f"fc{layer}.weight", f"weight{layer}").replace(f"fc{layer}.bias", f"bias{layer}")
        num_experts = 2 if name.startswith("shared") else 4
        value = value.view(num_experts, -1) if name.endswith(("bias1", "bias2")) else value
        old[name] = value.long() if name.endswith(("bias_steps", "pending_counts")) else value
    return old


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", list(FORMAT_3))
def test_format_2_loads_with_the_same_logits(name: str, assign: bool) -> None:
    head, other = build(name).eval(), torch.nn.Sequential(build(name)).eval()
    if name == "bias_balanced":
        head.router.bias_steps.copy_(torch.tensor([3, -2, 0, 1]))
    old = in_format_2(head)
    before = {key: value.clone() for key, value in old.items()}
    other.load_state_dict({f"0.{key}": value for key, value in old.items()}, assign=assign)
    x = torch.randn(50, 6)
    assert torch.equal(other(x), head(x))
    assert all(torch.equal(old[key], before[key]) for key in before)
    other.train()(x).sum().backward()
    assert {key: value.dtype for key, value in other[0].state_dict().items()} == {
        key: value.dtype for key, value in head.state_dict().items()
    }


def test_a_head_saved_with_the_old_default_is_named_with_the_remedy() -> None:
    old = in_format_2(build("noisy_top_k"))
    remedy = r"head: the state dict has format 2 or older, .* which were \*\*moe_heads.NOISY_TOP_K by default"
    with pytest.raises(RuntimeError, match="Unexpected key"), pytest.warns(UserWarning, match=remedy):
        build("sparse").load_state_dict(old)
    with pytest.warns(UserWarning, match=remedy):
        missing, unexpected = build("sparse").load_state_dict(old, strict=False)
    assert set(missing) == set(SHARED) and set(unexpected) == set(NOISE)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        build("soft").load_state_dict(old)


def test_an_older_head_that_read_plain_features_is_not_loaded_silently_into_one_that_normalizes_them() -> None:
    sizes = {"num_experts": 4, "expert_width": 8, "num_shared_experts": 2}
    old = in_format_2(SparseMoE(8, 3, **sizes, normalize=False))
    with pytest.warns(UserWarning, match="A wrong normalize changes the outputs and nothing else"):
        SparseMoE(8, 3, **sizes).load_state_dict(old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SparseMoE(8, 3, **sizes, normalize=False).load_state_dict(old)
        SparseMoE(8, 3, **sizes).load_state_dict(SparseMoE(8, 3, **sizes).state_dict())


def test_a_state_dict_without_metadata_loads() -> None:
    head = build("sparse")
    build("sparse").load_state_dict(dict(head.state_dict()))


@pytest.mark.parametrize("name", list(FORMAT_3))
def test_repr_tells_the_sizes(name: str) -> None:
    text = repr(build(name))
    total = sum(p.numel() for p in build(name).parameters())
    assert f"in_features=6, num_classes=3, parameters={total:,}, active=" in text
    if name != "dense":
        assert "(fc1): StackedLinear(num_experts=4, in_features=6, out_features=8)" in text


@pytest.mark.parametrize("name", list(FORMAT_3))
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


@pytest.mark.parametrize("name", list(FORMAT_3))
def test_deepcopy_is_independent(name: str) -> None:
    head = build(name).eval()
    twin = copy.deepcopy(head)
    x = torch.randn(4, 6)
    expected = head(x)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    assert torch.equal(twin(x), expected)

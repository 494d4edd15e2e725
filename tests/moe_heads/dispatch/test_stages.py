"""Stages of the paths: the work besides the arithmetic of the experts."""

import pytest
import torch

from moe_heads import Dense, SoftMoE, SparseMoE
from moe_heads.dispatch import stages


def head_of(dispatch: str, **options: object) -> SparseMoE:
    return SparseMoE(16, 4, num_experts=4, expert_width=8, dispatch=dispatch, **options).eval()


@pytest.mark.parametrize(
    ("dispatch", "rows", "expected"),
    [
        ("all", 6, {"dispatch": (6, 4)}),
        ("gathered", 6, {"combine": (6, 4)}),
        ("ragged", 6, {"dispatch": (12, 16), "combine": (6, 4)}),
        ("grouped", 6, {"dispatch": (12, 16), "combine": (6, 4)}),
        ("ragged", 1, {"combine": (1, 4)}),
    ],
)
def test_shapes_are_those_inside_the_path(dispatch: str, rows: int, expected: dict[str, tuple[int, ...]]) -> None:
    found = head_of(dispatch).stages(torch.randn(rows, 16))
    assert set(found) == ({"dispatch"} if dispatch == "all" else {"dispatch", "combine"})
    outputs = {name: stage() for name, stage in found.items()}
    for name, shape in expected.items():
        assert outputs[name].shape == shape


def test_what_is_dispatched_are_the_rows_and_weights_of_the_choices() -> None:
    x = torch.randn(5, 16)
    ragged = head_of("ragged")
    routing = ragged(x, return_routing=True).routing
    _, order = routing.indices.flatten().sort(stable=True)
    assert torch.equal(ragged.stages(x)["dispatch"](), x[order // 2])
    assert ragged.stages(x[:1])["dispatch"]() == routing.indices[:1].tolist()
    gathered = head_of("gathered")
    weight1 = gathered.stages(x)["dispatch"]()[0]
    indices = gathered(x, return_routing=True).routing.indices
    assert torch.equal(weight1, gathered.experts.fc1.weight[indices])
    gates = head_of("all")
    assert torch.equal(gates.stages(x)["dispatch"](), gates(x, return_routing=True).routing.gates)


def test_tokens_are_rows_and_auto_is_what_would_run() -> None:
    tokens = torch.randn(2, 3, 16)
    assert head_of("ragged").stages(tokens)["dispatch"]().shape == (12, 16)
    head = head_of("auto")
    assert "combine" not in head.stages(torch.randn(1, 16))  # all experts together
    with torch.inference_mode():
        assert "combine" in SparseMoE(512, 4).stages(torch.randn(1, 512))  # two of eight experts
    with pytest.raises(ValueError, match=r"expected torch\.float32, the dtype of the experts"):
        stages(head.experts, tokens[0].double(), head(tokens[0], return_routing=True).routing, "auto")


def test_other_heads_have_none() -> None:
    for head in (Dense(16, 4, width=8), SoftMoE(16, 4, num_experts=2, expert_width=4)):
        assert head.stages(torch.randn(2, 16)) == {}

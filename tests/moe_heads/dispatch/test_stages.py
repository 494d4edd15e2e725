"""Stages of the paths: the work besides the arithmetic of the experts."""

import pytest
import torch

from moe_heads import Dense, Routing, SoftMoE, SparseMoE
from moe_heads.dispatch import all_experts, stages


def head_of(dispatch: str, **options: object) -> SparseMoE:
    return SparseMoE(16, 4, num_experts=4, expert_width=8, dispatch=dispatch, **options).eval()


@pytest.mark.parametrize(
    ("dispatch", "rows", "expected"),
    [
        ("all", 6, {"combine": (6, 4)}),
        ("gathered", 6, {"combine": (6, 4)}),
        ("ragged", 6, {"dispatch": (12, 16), "combine": (6, 4)}),
        ("grouped", 6, {"dispatch": (12, 16), "combine": (6, 4)}),
        ("ragged", 1, {"combine": (1, 4)}),
    ],
)
def test_shapes_are_those_inside_the_path(dispatch: str, rows: int, expected: dict[str, tuple[int, ...]]) -> None:
    found = head_of(dispatch).stages(torch.randn(rows, 16))
    assert set(found) == ({"combine"} if dispatch == "all" else {"dispatch", "combine"})
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
    narrow = SparseMoE(16, 40, num_experts=4, expert_width=8, dispatch="all").eval()  # many classes
    assert torch.equal(narrow.stages(x)["dispatch"](), narrow(x, return_routing=True).routing.gates)


def test_the_path_of_all_experts_runs_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"combine": 0, "gates": 0}
    combine, gates = all_experts.combine_chosen, Routing.gates

    def counted(logits: torch.Tensor, routing: Routing) -> torch.Tensor:
        calls["combine"] += 1
        return combine(logits, routing)

    def counted_gates(routing: Routing) -> torch.Tensor:
        calls["gates"] += 1
        return gates.fget(routing)

    monkeypatch.setattr(all_experts, "combine_chosen", counted)
    monkeypatch.setattr(Routing, "gates", property(counted_gates))
    for classes, expected in ((4, {"combine": 1, "gates": 0}), (40, {"combine": 0, "gates": 1})):
        head = SparseMoE(16, classes, num_experts=4, expert_width=8, dispatch="all").eval()
        calls.update(combine=0, gates=0)
        head(torch.randn(5, 16))
        assert calls == expected


def test_tokens_are_rows_and_auto_is_what_would_run() -> None:
    tokens = torch.randn(2, 3, 16)
    assert head_of("ragged").stages(tokens)["dispatch"]().shape == (12, 16)
    head = head_of("auto")
    assert "dispatch" not in head.stages(torch.randn(1, 16))  # all experts together
    with torch.inference_mode():
        assert "dispatch" in SparseMoE(512, 4).stages(torch.randn(1, 512))  # two of eight experts
    with pytest.raises(ValueError, match=r"expected torch\.float32, the dtype of the experts"):
        stages(head.experts, tokens[0].double(), head(tokens[0], return_routing=True).routing, "auto")


def test_other_heads_have_none() -> None:
    for head in (Dense(16, 4, width=8), SoftMoE(16, 4, num_experts=2, expert_width=4)):
        assert head.stages(torch.randn(2, 16)) == {}

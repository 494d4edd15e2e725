import pytest

from moe_heads.analysis.expert_utilization.maps import short_names


@pytest.mark.parametrize(
    ("names", "short", "pattern"),
    [
        (["layers.0.mlp.gate", "layers.10.mlp.gate"], ["0", "10"], "layers.*.mlp.gate"),
        (["encoder.0.gate", "decoder.0.gate"], ["encoder", "decoder"], "*.0.gate"),
        (["0", "1"], ["0", "1"], ""),
        (["a.gate", "a.gate.inner"], ["gate", "gate.inner"], "a.*"),
        (["a.0.b.0.c", "a.1.b.1.c"], ["0.b.0", "1.b.1"], "a.*.c"),
        (["layers.0.mlp.gate"], ["layers.0.mlp.gate"], ""),
        (["head", "layers.0.gate"], ["head", "layers.0.gate"], ""),
    ],
)
def test_names_are_shortened_to_their_differences(names: list[str], short: list[str], pattern: str) -> None:
    assert short_names(names) == (short, pattern)

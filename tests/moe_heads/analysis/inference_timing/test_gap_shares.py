"""Where the time of a head goes, in units of the time of the dense head."""

from dataclasses import replace

import pytest

from moe_heads.analysis.inference_timing.gap_shares import gap_shares
from moe_heads.analysis.inference_timing.limits import Bound
from moe_heads.analysis.inference_timing.speedup import Gap, GapPoint, WiderHead
from moe_heads.analysis.inference_timing.stages import Part
from tests.moe_heads.analysis.inference_timing.test_result import timing


def part(size: int, name: str, ms: float, whole: str = "head") -> Part:
    return Part(size, whole, name, ms, ms, ms, "timed alone")


# the dense head takes 2 ms, the head 4 ms
POINT = GapPoint(8, "eager", 4.0, 0.5, 0.45, 0.55, 0.7, Bound(1.0, "memory"), Bound(1.4, "launches", 0.5))
GAP = Gap("head", "eager", 100, 100, (POINT,), None)
WIDEST = "1,024 hidden units of an expert"
PARTS = (part(8, "router", 1.0), part(8, "experts", 3.0), part(8, "head", 9.0, "model"), part(1, "router", 7.0))


def test_the_parts_sum_to_the_time_of_the_head() -> None:
    (shares,) = gap_shares(GAP, PARTS)
    assert shares.parts == pytest.approx({"router": 0.5, "experts": 1.5}) and shares.total == pytest.approx(2)
    assert shares.theoretical == 0.25 and shares.launches == pytest.approx(0.25)
    assert str(shares) == (
        "At batch size 8, the head takes 2 times the time of the dense head for 0.25 times its operations:"
        " router 0.5, experts 1.5; launches of operators are 0.25 of it"
    )


def test_without_a_bound_the_launches_are_unknown() -> None:
    (shares,) = gap_shares(replace(GAP, points=(replace(POINT, head_bound=None),)), PARTS)
    assert shares.launches is None and "launches" not in str(shares)


def test_other_modes_and_heads_without_parts_are_not_divided() -> None:
    assert not gap_shares(replace(GAP, mode="bf16"), PARTS)
    assert not gap_shares(replace(GAP, head="other"), PARTS)


@pytest.mark.parametrize(
    ("low", "headline", "verdict"),
    [
        (1.2, "faster with 1,024 units per expert", f"faster from about {WIDEST} on: 1.3"),
        (
            0.8,
            "not faster with up to 1,024 units per expert",
            f"not faster up to {WIDEST} either: 1.3",
        ),
    ],
)
def test_the_size_from_which_on_a_slow_head_is_faster(low: float, headline: str, verdict: str) -> None:
    gap = replace(GAP, wider=(WiderHead(512, 8, 0.7, 0.6, 0.8), WiderHead(1024, 8, 1.3, low, 1.4)))
    assert gap.headline() == headline
    assert gap.verdict() == (
        f"slower than the dense head at every batch size from 8 to 8; {verdict} ({low:g} to 1.4) at batch size 8"
    )


def test_the_figure_divides_the_time() -> None:
    result = replace(timing(), gaps=(GAP,), parts=PARTS)
    speedup, parts = result.plot_gap().axes
    assert "not faster at the largest batch size" in speedup.get_title()
    assert [bar.get_height() for bar in parts.patches] == pytest.approx([0.5, 1.5])
    lines = {line.get_label(): list(line.get_ydata()) for line in parts.get_lines()}
    assert lines == {"theoretical": [0.25], "launches alone": [0.25], "dense head": [1, 1]}
    assert str(gap_shares(GAP, PARTS)[0]) in result.summary()

"""Where the time of each head goes, in the report of a study."""

from typing import Any

import pytest
from study.figures import figures
from study.parts_over_dense import parts_over_dense

PREFIX = "inference_timing/test/head/batch256/"


def run(head: str, seed: int, **metrics: float) -> Any:
    return {"head": head, "seed": seed, "metrics": {PREFIX + name: value for name, value in metrics.items()}}


def runs() -> list[Any]:
    common = {"speedup": 0.5, "theoretical_speedup": 4.0}
    return [
        run("sparse", 0, router_over_dense=1.0, experts_over_dense=1.0, launches_over_dense=0.3, **common),
        run("sparse", 1, router_over_dense=2.0, experts_over_dense=0.0, launches_over_dense=0.5, **common),
        run("soft", 0, speedup=0.9),
    ]


def test_means_over_the_runs_of_a_head() -> None:
    found = parts_over_dense(runs(), "sparse")
    assert found is not None and found.parts == {"router": 1.5, "experts": 0.5}
    assert found.launches == pytest.approx(0.4) and found.theoretical == 0.25
    assert parts_over_dense(runs(), "soft") is None


def test_the_figure_of_the_speed_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("study.figures.heads_of", lambda runs: ["dense", "soft", "sparse"])
    for name in ("_loads", "_gaps", "_lines", "_panels"):
        monkeypatch.setattr(f"study.figures.{name}", lambda *_: None)
    *_, parts = figures(runs())["speed"].axes
    assert [bar.get_height() for bar in parts.patches] == [1.5, 0.5]
    assert {line.get_label(): line.get_ydata().tolist() for line in parts.get_lines()[:2]} == {
        "theoretical": [0.25],
        "launches alone": [0.4],
    }

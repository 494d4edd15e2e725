"""Each claim with runs for which it is supported, not supported, and undecided."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from study.claims import CLAIMS, comparisons_of, verdicts
from study.rules import Verdict
from study.tables import main_table

from tests.support.study_runs import Change, make_runs

HEADS = ("dense", "soft", "sparse")


def judged(runs: list[dict[str, Any]]) -> dict[str, Verdict]:
    return {verdict.name: verdict for verdict in verdicts(runs, comparisons_of(runs, HEADS))}


def shifted(metric: str, level: float, noise: float) -> Change:
    """A metric at a level, with noise of a seed."""
    return lambda seed, rng: {metric: float(level + noise * rng.normal())}


def scaled(factors: Mapping[str, float], noise: float = 0.03) -> Change:
    return lambda seed, rng: {name: float(value * np.exp(noise * rng.normal())) for name, value in factors.items()}


def test_more_accurate() -> None:
    better = {head: shifted("plain/test/accuracy", 0.915, 0.0005) for head in ("soft", "sparse")}
    assert judged(make_runs(6, better))["accuracy"].outcome == "Supported"
    mixed = {**better, "sparse": shifted("plain/test/accuracy", 0.88, 0.0005)}
    assert judged(make_runs(6, mixed))["accuracy"].outcome == "Not supported"
    noisy = {head: shifted("plain/test/accuracy", 0.905, 0.02) for head in ("soft", "sparse")}
    assert judged(make_runs(6, noisy))["accuracy"].outcome == "Undecided with 6 seeds"


def test_balance() -> None:
    runs = make_runs(4)
    assert judged(runs)["balanced_experts"].outcome == "Supported"
    one = next(run for run in runs if run["head"] == "sparse")
    one["loads"] = {"test": {"load": [0.03, *[0.97 / 7] * 7]}}  # a quarter of the fair share is 0.031
    verdict = judged(runs)["balanced_experts"]
    assert verdict.outcome == "Not supported"
    assert verdict.statements[1].text.startswith("sparse: the least-used expert has")
    assert "0.24 in the worst of 4 runs" in verdict.statements[1].text


def test_sharper() -> None:
    metrics = {"sharpness/train/lambda_max": 10.0, "sharpness/train/trace": 50.0}
    sharper = {name: 2 * value for name, value in metrics.items()}
    as_claimed = {"dense": scaled(metrics), "soft": scaled(sharper), "sparse": scaled(metrics)}
    assert judged(make_runs(6, as_claimed))["curvature"].outcome == "Supported"
    reverse = as_claimed | {"soft": scaled({name: value / 2 for name, value in metrics.items()})}
    assert judged(make_runs(6, reverse))["curvature"].outcome == "Not supported"
    sparse_too = as_claimed | {"sparse": scaled({name: 3 * value for name, value in metrics.items()})}
    assert judged(make_runs(6, sparse_too))["curvature"].outcome == "Not supported"
    noisy = {head: scaled(metrics, noise=1.0) for head in HEADS}
    assert judged(make_runs(6, noisy))["curvature"].outcome == "Undecided with 6 seeds"


def test_what_only_the_correction_leaves_open_is_not_refuted() -> None:
    """Alike within the margin, but the 95 % interval lies above 1: p is 0.03 before the correction, 0.09 after."""
    factors = np.exp(0.1345 + 0.0908 * np.array([-1.265, -0.632, 0.0, 0.632, 1.265]))
    lambda_max = "sharpness/train/lambda_max"
    found = judged(
        make_runs(
            5,
            {
                "dense": lambda seed, rng: {lambda_max: 10.0},
                "soft": lambda seed, rng: {lambda_max: 10.0 * float(factors[seed])},
                "sparse": scaled({lambda_max: 10.0}, noise=1.0),
            },
        )
    )["curvature"].statements[0]
    assert found.text.startswith("λmax train: soft / dense = 1.144 [1.022, 1.280] (90 %: [1.049, 1.247]), p = 0.089")
    assert found.is_true is None


def test_generalize_alike() -> None:
    jitter = {head: shifted("plain/test/loss", 0.35, 0.002) for head in HEADS}
    assert judged(make_runs(6, jitter))["generalization"].outcome == "Supported"
    worse = jitter | {"soft": shifted("plain/test/loss", 0.6, 0.002)}
    assert judged(make_runs(6, worse))["generalization"].outcome == "Not supported"
    noisy = {head: shifted("plain/test/loss", 0.35, 0.2) for head in HEADS}
    assert judged(make_runs(6, noisy))["generalization"].outcome == "Undecided with 6 seeds"


def reshaped(num_seeds: int, noise: float, width: float) -> list[dict[str, Any]]:
    """Lines of the MoE heads that rise as |α| less than the dense head's parabola, or alike for a width of 0."""
    runs = make_runs(num_seeds)
    for run in runs:
        line, rng = run["lines"]["train"], np.random.default_rng([run["seed"], len(run["head"])])
        factor = np.exp(noise * rng.normal()) * (1 if run["head"] == "dense" else np.exp(width))
        line["losses"] = [0.2 + (loss - 0.2) * factor for loss in line["losses"]]
    return runs


def test_other_landscapes() -> None:
    assert judged(reshaped(6, 0.02, 1.5))["landscape_shape"].outcome == "Supported"
    assert judged(reshaped(6, 0.02, 0.0))["landscape_shape"].outcome == "Not supported"
    assert judged(reshaped(6, 1.0, 0.0))["landscape_shape"].outcome == "Undecided with 6 seeds"


def test_no_speed_up() -> None:
    prefix = "inference_timing/test"

    def timed(dense_ms: float) -> Change:
        fixed = {f"{prefix}/model/batch256/p50_ms": 10.0, f"{prefix}/head/batch256/p50_ms": 1.0}
        dense = f"{prefix}/head_dense/batch256/p50_ms"
        return lambda seed, rng: fixed | {dense: float(dense_ms * np.exp(0.01 * rng.normal()))}

    assert judged(make_runs(4, {"sparse": timed(1.1)}))["routing_speed"].outcome == "Supported"
    assert judged(make_runs(4, {"sparse": timed(5.0)}))["routing_speed"].outcome == "Not supported"


def test_claims_are_numbered_in_order_and_named_as_their_functions() -> None:
    found = verdicts(make_runs(2), [])
    assert [verdict.number for verdict in found] == [1, 2, 3, 4, 5, 6]
    assert [verdict.name for verdict in found] == [claim.__name__ for claim in CLAIMS]


def test_one_seed_decides_nothing() -> None:
    outcomes = {verdict.outcome for verdict in judged(make_runs(1)).values()}
    assert outcomes == {"Undecided with 1 seed"}


@pytest.mark.parametrize("missing", HEADS)
def test_a_head_that_is_missing_leaves_its_claims_open(missing: str) -> None:
    runs = [run for run in make_runs(5) if run["head"] != missing]
    found = judged(runs)
    assert found["generalization"].outcome == "Undecided with 0 seeds"
    assert any("not measured for both" in statement.text for statement in found["generalization"].statements)


def test_soft_experts_are_judged_by_their_weight() -> None:
    """All of them run: the largest gate of a row is no load."""
    runs = make_runs(4)
    for run in runs:
        if run["head"] == "soft":
            run["loads"]["test"]["load"] = [0.0, *[1 / 7] * 7]
    assert judged(runs)["balanced_experts"].outcome == "Supported"


def test_equal_accuracy_is_no_advantage() -> None:
    equal = {head: shifted("plain/test/accuracy", 0.9, 0.0001) for head in HEADS}
    assert judged(make_runs(12, equal))["accuracy"].outcome == "Not supported"


def test_other_heads_change_no_verdict() -> None:
    better = {head: shifted("plain/test/accuracy", 0.902, 0.0008) for head in ("soft", "sparse")}
    runs = make_runs(5, better)
    more = [run | {"head": "hard"} for run in make_runs(5) if run["head"] == "sparse"]
    assert judged(runs)["accuracy"] == judged(runs + more)["accuracy"]


def test_one_kind_of_difference_is_enough() -> None:
    """Claim 5 is about some quantity, not about all of them."""
    runs = reshaped(6, 0.02, 1.5)
    for run in runs:  # a curvature that goes with the rise: the shape is the same
        rise = max(run["lines"]["train"]["losses"]) - 0.2
        run["metrics"]["sharpness/train/lambda_max"] = 8 * rise
    assert judged(runs)["landscape_shape"].outcome == "Supported"


def test_a_radius_beyond_reach_is_not_left_out_in_silence() -> None:
    runs = make_runs(4)
    flat = next(run for run in runs if run["head"] == "sparse")["lines"]["train"]
    flat["losses"] = [0.2 + (loss - 0.2) / 1e3 for loss in flat["losses"]]
    assert not any(c.quantity.key == "radius" and "sparse" in (c.head, c.baseline) for c in comparisons_of(runs, HEADS))
    row = next(line for line in main_table(runs).splitlines() if line.startswith("| radius"))
    assert "beyond the line in 1 of 4 runs" in row


def test_evidence_names_numbers() -> None:
    texts = [statement.text for verdict in judged(make_runs(3)).values() for statement in verdict.statements]
    assert all(any(character.isdigit() for character in text) for text in texts)
    assert not any("nan" in text or "None" in text for text in texts)

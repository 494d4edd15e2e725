"""Invented runs of a study, with known numbers."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

MACHINE = {
    "device": "cpu",
    "name": "abacus",
    "capability": "BEADS",
    "threads": 1,
    "precision": "32-true",
    "python": "3.11.9",
    "packages": {"torch": "2.15.0", "lightning": "2.6.6"},
    "commit": "abc1234",
}


def make_run(head: str, seed: int, **metrics: float) -> dict[str, Any]:
    """A run with the metrics given by their names."""
    rng = np.random.default_rng(100 * seed + 7)
    jitter = rng.normal(size=8)
    lambda_max = metrics.get("sharpness/train/lambda_max", 10.0)
    alphas = np.linspace(-0.5, 0.5, 21)
    rises = 0.5 * lambda_max * alphas**2
    routed, shares = head != "dense", [0.13, 0.12, 0.125, 0.125, 0.13, 0.12, 0.125, 0.125]
    base = {
        "plain/test/accuracy": 0.9 + 0.001 * jitter[0],
        "plain/test/loss": 0.35 + 0.005 * jitter[1],
        "test/calibration_error": 0.02 + 0.001 * jitter[2],
        "plain/train/loss": 0.2 + 0.005 * jitter[1],
        "plain/val/accuracy": 0.9 + 0.001 * jitter[3],
        "sharpness/train/lambda_max": 10.0 * float(np.exp(0.05 * jitter[4])),
        "sharpness/test/lambda_max": 20.0,
        "sharpness/train/trace": 50.0,
        "sharpness/test/trace": 90.0,
        "inference_timing/test/head/batch256/p50_ms": 0.5,
        "inference_timing/test/model/batch256/p50_ms": 50.0,
    }
    if routed:
        base |= {
            "expert_utilization/test/head/effective_experts": 7.9,
            "inference_timing/test/head/batch256/speedup": 1.5,
            "inference_timing/test/head_dense/batch256/p50_ms": 0.75,
        }
    return {
        "head": head,
        "seed": seed,
        "config": {"backbone": "abacus"},
        "capacity": {"total": 1000, "active": 400 if routed else 1000, "backbone": 5000},
        "metrics": base | metrics,
        "lines": {"train": {"alphas": alphas.tolist(), "losses": (0.2 + rises).tolist()}},
        "loads": {"test": {"load": shares, "importance": shares}} if routed else {},
        "training_seconds": 60.0,
        "analysis_seconds": 30.0,
        "machine": MACHINE,
    }


Change = Callable[[int, np.random.Generator], Mapping[str, float]]


def make_runs(num_seeds: int, changes: Mapping[str, Change] | None = None) -> list[dict[str, Any]]:
    """Runs of the three heads; a change gives a head's metrics for a seed."""
    runs = []
    for head in ("dense", "soft", "sparse"):
        for seed in range(num_seeds):
            rng = np.random.default_rng([seed, len(head)])
            change = (changes or {}).get(head)
            runs.append(make_run(head, seed, **({} if change is None else change(seed, rng))))
    return runs

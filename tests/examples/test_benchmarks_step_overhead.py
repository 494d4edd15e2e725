"""Benchmark of the hooks between analyses at small size."""

import json
from pathlib import Path

import pytest

from tests.support.benchmark_scripts import benchmark_script


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_hooks_are_compared_with_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    with benchmark_script("step_overhead", monkeypatch) as script:
        report = script.main(["--rounds", "1", "--out", str(out)])
    assert json.loads(out.read_text()) == report
    assert 0 < report["share_of_a_step"]["hooks_of_trainer"] < 1

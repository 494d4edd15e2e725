"""The report of the study as one self-contained file."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from study import report
from study.figures import figures
from study.options import Options, parse

from tests.support.study_runs import make_runs

DATA = {
    "kind": "imagefolder",
    "files": [".jpg"],
    "name": None,
    "num_classes": 10,
    "train": 45000,
    "val": 5000,
    "test": 10000,
    "sha256": "0",
}


def options(folder: Path, *arguments: str) -> Options:
    return parse(["--out", str(folder), *arguments])


def written(folder: Path, num_seeds: int, heads: Sequence[str] = ("dense", "soft", "sparse")) -> str:
    runs = [run for run in make_runs(num_seeds) if run["head"] in heads]
    path = report.write(options(folder, "--heads", *heads), DATA, runs)
    return path.read_text(encoding="utf-8")


def test_page_stands_alone(tmp_path: Path) -> None:
    text = written(tmp_path, 3)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == text.count("![") > 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page.count("<table>") == 4


def test_every_claim_has_a_verdict_and_its_numbers(tmp_path: Path) -> None:
    text = written(tmp_path, 4)
    assert len(re.findall(r"^Verdict: \*\*(Supported|Not supported|Undecided with 4 seeds)\*\*\.$", text, re.M)) == 6
    assert "nan" not in text and "None" not in text
    assert "(.jpg files of 10 classes)" in text and "abacus" in text and "abc1234" in text


def test_tables_are_not_broken_by_what_stands_in_them(tmp_path: Path) -> None:
    for block in written(tmp_path, 3).split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_what_was_not_measured_is_absent(tmp_path: Path) -> None:
    text = written(tmp_path, 2, heads=("dense",))
    assert "speed.png" not in text and "utilization.png" not in text
    assert "effective experts" not in text
    assert not (tmp_path / "speed.png").exists()


def test_a_figure_for_every_claim() -> None:
    assert set(figures(make_runs(2))) == {
        *("accuracy", "utilization", "sharpness", "generalization", "landscape", "speed")
    }


def test_use_of_the_busiest_expert_is_not_cut_off() -> None:
    """The first panel had fixed the limit of all before the others were drawn."""
    runs = make_runs(2)
    for run in runs:
        if run["head"] == "sparse":
            run["loads"]["test"]["load"] = [0.9] + [0.1 / 7] * 7
    for ax in figures(runs)["utilization"].axes:
        lines = [line for line in ax.lines if line.get_marker() == "."]
        assert lines and ax.get_ylim()[0] == 0
        assert max(np.max(line.get_ydata()) for line in lines) < ax.get_ylim()[1]


def test_a_page_written_again_is_the_same(tmp_path: Path) -> None:
    first = written(tmp_path, 3)
    assert written(tmp_path, 3) == first


@pytest.mark.parametrize("preset", ["digits", "paper", "paper-as-published", "cpu", "gpu"])
def test_presets_are_whole(preset: str, tmp_path: Path) -> None:
    chosen = options(tmp_path, "--preset", preset)
    assert chosen.preset == preset
    assert parse(["--preset", preset, "--epochs", "3"]).epochs == 3


def test_presets_differ_where_their_names_say(tmp_path: Path) -> None:
    paper, published = (options(tmp_path, "--preset", name).config() for name in ("paper", "paper-as-published"))
    assert {name for name in paper if paper[name] != published[name]} == {"augment", "load_loss", "engine"}

import subprocess
import sys

import pytest

from moe_heads.cli import main
from tests.support.sources import ROOT


def test_without_jsonargparse_one_sentence_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["analyze"]) == 2
    assert capsys.readouterr().err == 'moe-heads: jsonargparse is not installed: run `pip install "moe-heads[cli]"`.\n'


@pytest.mark.parametrize("args", [[], ["analyze"], ["compare"], ["fit"]])
def test_a_missing_argument_is_status_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_help_lists_the_options_of_the_callbacks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["analyze", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "--sharpness.num_samples" in text and "--loss_landscape.line_points" in text
    assert "--sharpness.every_n_epochs" not in text


@pytest.mark.slow
def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "moe_heads.cli", "analyze", "--ckpt", "missing.ckpt", "--model", "a:b"]
    done = subprocess.run(
        [*command, "--data", "a:c", "--out", "unused"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "moe-heads: --ckpt: expected a file, got 'missing.ckpt', which does not exist."
    )

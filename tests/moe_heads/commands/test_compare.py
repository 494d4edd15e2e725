import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_heads.cli import main
from tests.moe_heads.commands.test_analyze import MODULE, Trained, command
from tests.support.checkpoint_models import Model


@pytest.fixture(scope="module")
def folders(trained: Trained, permuted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results of the trained network, of its permuted self, of another function and of another shape."""
    home = tmp_path_factory.mktemp("results")
    wide = home / "wide.ckpt"
    torch.save(Model(7).state_dict(), wide)
    sharpness = ["--sharpness.num_samples", "32", "--sharpness.num_eigenvalues", "1", "--sharpness.splits", "[train]"]
    quick = ["--analyses", "expert_utilization", "--expert_utilization.splits", "[train]"]
    runs = {
        "trained": (trained[0], "build"),
        "permuted": (permuted, "build"),
        "steep": (trained[0], "build_steep"),
        "wide": (wide, "build_wide"),
    }
    for name, (path, model) in runs.items():
        assert main(command(path, home / name, *(quick if name in {"steep", "wide"} else sharpness), model=model)) == 0
    return {name: home / name for name in runs}


def compare(folders: dict[str, Path], names: list[str], out: Path, *more: str) -> int:
    return main(["compare", *(str(folders[name]) for name in names), "--out", str(out), "--num_samples", "32", *more])


def test_a_network_has_no_barrier_to_its_permuted_self(folders: dict[str, Path], tmp_path: Path) -> None:
    assert compare(folders, ["trained", "permuted"], tmp_path / "page") == 0
    found = json.loads((tmp_path / "page" / "compare.json").read_text())
    (barrier,) = found["barriers"]
    assert barrier["before"]["barrier"] > 0.01 and barrier["before"]["stderr"] > 0
    assert barrier["after"]["barrier"] <= 1e-6 * barrier["after"]["losses"][0]
    assert barrier["matching"]["distance_after"] == 0 and not barrier["matching"]["not_used"]
    assert set(barrier["matching"]["moved"]) == {"units", "experts", "hidden units"}
    (section,) = found["numbers"]
    rows = {row["name"]: row for row in section["rows"]}
    assert rows["trace"]["compared"] and not rows["trace"]["different"]
    assert not rows["num_samples"]["compared"]


def test_the_page_needs_no_other_file(folders: dict[str, Path], tmp_path: Path) -> None:
    assert compare(folders, ["trained", "permuted", "wide"], tmp_path / "page") == 0
    page = (tmp_path / "page" / "compare.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page.count("data:image/svg+xml;base64,") == 2
    assert page.count("<tr") == page.count("</tr>") and page.count("<table") == page.count("</table>")
    assert "0 (up to rounding)" in page and "different shapes: wide has first.weight of shape (7, 5)" in page
    markdown = (tmp_path / "page" / "compare.md").read_text()
    assert "| trained – wide | – | – | – | – | different shapes" in markdown
    for image in ("spectra_train.png", "barriers.png"):
        assert f"({image})" in markdown and (tmp_path / "page" / image).is_file()
    assert [folder.name for folder in tmp_path.iterdir()] == ["page"]


def test_a_different_function_of_equal_weights_has_a_dash(folders: dict[str, Path], tmp_path: Path) -> None:
    assert compare(folders, ["trained", "steep"], tmp_path / "page") == 0
    (barrier,) = json.loads((tmp_path / "page" / "compare.json").read_text())["barriers"]
    assert "the modules differ in more than their weights" in barrier["reason"]


def test_a_changed_checkpoint_has_a_dash(folders: dict[str, Path], tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    result = json.loads((folders["trained"] / "result.json").read_text())
    cases: dict[str, dict[str, Any]] = {
        "the checkpoint has changed": {"checkpoint": {**result["checkpoint"], "sha256": "0"}},
        "which does not exist": {"checkpoint": {**result["checkpoint"], "path": "gone.ckpt"}},
        "the module has changed": {"model": {**result["model"], "weights_sha256": "0"}},
        "different data": {"data": f"{MODULE}:one_loader"},
    }
    for number, (message, changes) in enumerate(cases.items()):
        (changed / "result.json").write_text(json.dumps({**result, **changes}))
        assert compare({**folders, "changed": changed}, ["trained", "changed"], tmp_path / str(number)) == 0
        (barrier,) = json.loads((tmp_path / str(number) / "compare.json").read_text())["barriers"]
        assert message in barrier["reason"]


def test_barriers_can_be_skipped(folders: dict[str, Path], tmp_path: Path) -> None:
    assert compare(folders, ["trained", "permuted"], tmp_path / "page", "--no_barriers") == 0
    assert json.loads((tmp_path / "page" / "compare.json").read_text())["barriers"] == []


def test_errors_are_one_sentence(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "result.json").write_text('{"format": 0}')
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").touch()
    found = {**folders, "old": tmp_path / "old", "none": tmp_path / "none"}
    cases = [
        (["trained"], "page", [], "dirs: expected at least two folders, got 1"),
        (["trained", "trained"], "page", [], "dirs: expected different folders"),
        (["trained", "none"], "page", [], "dirs: expected a folder that `moe-heads analyze` has written"),
        (["trained", "old"], "page", [], "dirs: expected format 1"),
        (
            ["trained", "permuted"],
            "page",
            ["--num_points", "2"],
            "num_points: expected an integer of at least 3",
        ),
        (["trained", "permuted"], "used", ["--overwrite"], "--out: expected a folder with compare.json to overwrite"),
    ]
    for names, out, more, message in cases:
        assert compare(found, names, tmp_path / out, *more) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
    assert not (tmp_path / "page").exists() and (tmp_path / "used" / "notes.txt").is_file()

"""The stored notebooks: their cells are those of the scripts, which run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples/notebooks").glob("*.py"))


def cells_of(script: str) -> list[tuple[str, str]]:
    """Return kind and source of the cells of a script in the percent format."""
    cells = []
    for part in script.split("# %%")[1:]:
        marker, _, body = part.partition("\n")
        kind = "markdown" if "[markdown]" in marker else "code"
        if kind == "markdown":
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines())
        cells.append((kind, body.replace("# %matplotlib", "%matplotlib").strip()))
    return cells


def notebook_of(script: Path) -> dict[str, Any]:
    return json.loads(script.with_suffix(".ipynb").read_text())


def test_every_notebook_has_a_script() -> None:
    assert SCRIPTS
    assert {path.stem for path in (ROOT / "examples/notebooks").glob("*.ipynb")} == {path.stem for path in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_stored_notebook_is_that_of_the_script(script: Path) -> None:
    stored = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in notebook_of(script)["cells"]]
    assert stored == cells_of(script.read_text()), "run `make notebooks`"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_stored_notebook_has_output_without_errors_and_paths(script: Path) -> None:
    outputs = [output for cell in notebook_of(script)["cells"] for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(output["output_type"] in {"stream", "execute_result", "display_data"} for output in outputs)
    assert "site-packages" not in json.dumps(outputs)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_script_runs(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

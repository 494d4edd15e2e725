"""The HTML page: one self-contained file with the values of the landscape."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_heads.analysis import Trajectory, landscape_page
from moe_heads.analysis.loss_landscape.result import LossLandscapeResult


def landscape(losses: torch.Tensor, **fields: Any) -> LossLandscapeResult:
    axes = [torch.linspace(-1, 1, size, dtype=torch.float64) for size in losses.shape]
    return LossLandscapeResult(
        alphas=axes[0],
        betas=axes[1] if len(axes) > 1 else None,
        losses=losses.double(),
        accuracies=None,
        center_loss=1.0,
        center_accuracy=None,
        num_samples=8,
        seed=0,
        **({"routing_flips": None} | fields),
    )


RUN = Trajectory(
    coordinates=torch.tensor([[0.5, 0.5], [0.0, 0.0]], dtype=torch.float64),
    residuals=torch.tensor([0.1, 0.0], dtype=torch.float64),
    distances=torch.tensor([0.7, 0.0], dtype=torch.float64),
    explained_variance=(0.9, 0.1),
    labels=("start</script>", "end"),
)


def page() -> str:
    losses = torch.tensor([[1.0, 2.0, math.nan], [1.0, 1.0, math.inf], [4.0, 5.0, 6.0]])
    line = landscape(torch.tensor([2.0, 1.0, 3.0]), losses_fixed_routing=torch.tensor([1.5, 1.0, 2.0]))
    return landscape_page({"line": line, "plane": landscape(losses, trajectory=RUN)}, title="A run")


def test_page_has_the_values_of_the_landscapes() -> None:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page(), flags=re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert data["title"] == "A run"
    assert data["cuts"]["plane"]["quantities"]["loss"] == [[1, 2, None], [1, 1, None], [4, 5, 6]]
    assert data["cuts"]["plane"]["trajectory"]["labels"] == ["start</script>", "end"]
    assert data["cuts"]["line"]["betas"] is None
    assert list(data["cuts"]["line"]["quantities"]) == ["loss", "loss at fixed routing"]


def test_page_needs_no_network() -> None:
    assert not re.search(r"https?://|src=|@import|fetch\(", page())


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_script_is_valid(tmp_path: Path) -> None:
    scripts = re.findall(r"<script>(.*?)</script>", page(), flags=re.DOTALL)
    assert len(scripts) == 1
    (tmp_path / "page.js").write_text(scripts[0])
    subprocess.run(["node", "--check", tmp_path / "page.js"], check=True)


# Replaces a browser, and records the texts that are drawn on the canvas.
BROWSER = """
const texts = [], paper = new Proxy({ fillText: (text) => texts.push(text) }, { get: (t, k) => t[k] ?? (() => {}) });
const elements = {};
globalThis.Option = class { constructor(name) { this.value = name; } };
globalThis.document = { getElementById: (id) => elements[id] ??= {
  textContent: id === "data" ? DATA : "", width: 860, height: 560, value: "", getContext: () => paper,
  addEventListener: () => {}, replaceChildren(...options) { this.value = options[0].value; },
} };
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_axes_have_tick_labels(tmp_path: Path) -> None:
    written = {}
    for name, losses in (("line", torch.tensor([2.0, 1.0, 5.0])), ("plane", torch.tensor([[2.0, 3.0], [7.0, 6.0]]))):
        whole = landscape_page({name: landscape(losses)})
        data, script = (re.search(f"<script{kind}>(.*?)</script>", whole, re.DOTALL) for kind in (" [^>]*", ""))
        assert data is not None and script is not None
        stub = BROWSER.replace("DATA", json.dumps(data[1]))
        (tmp_path / "page.js").write_text(f"{stub}{script[1]}\nconsole.log(JSON.stringify(texts));")
        ran = subprocess.run(["node", tmp_path / "page.js"], check=True, capture_output=True, text=True)
        written[name] = json.loads(ran.stdout)
    assert written["line"] == ["loss", "-1", "-0.5", "0", "0.5", "1", "1", "2", "3", "4", "5", "α"]
    assert written["plane"] == [*2 * ["-1", "-0.5", "0", "0.5", "1"], "α", "β", "2", "3", "4", "5", "6", "7"]


def test_no_landscape() -> None:
    with pytest.raises(ValueError, match="cuts: expected at least one landscape, got none"):
        landscape_page({})

"""Every example that people can copy runs: docstrings, README, docs."""

import doctest
import importlib
import os
import re
from pathlib import Path

import pytest

from tests.support.sources import ROOT, sources

MODULES = [name for name in sources() if not name.startswith("examples")]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failures, _ = doctest.testmod(module, optionflags=flags)
    assert failures == 0


def python_blocks(page: Path) -> list[str]:
    """Code of the page's ```python blocks."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_runnable(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(python_blocks(page), start=1):
        # every block stands alone, as a reader would copy it
        exec(compile(block, f"{page.name}, python block {number}", "exec"), {"__name__": "__main__"})


def test_the_readme_shows_the_three_uses() -> None:
    assert len(python_blocks(ROOT / "README.md")) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_and_to_pictures_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not os.path.exists(page.parent / target)]
    assert not missing

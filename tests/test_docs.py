"""Every example that people can copy runs: docstrings, README, docs."""

import doctest
import importlib
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import moe_heads
import moe_heads.analysis
import moe_heads.callbacks
import moe_heads.lightning_modules
from tests.support.sources import ROOT, sources

MODULES = [name for name in sources() if not name.startswith("examples")]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failures, _ = doctest.testmod(module, optionflags=flags)
    assert failures == 0


PACKAGES = (moe_heads, moe_heads.analysis, moe_heads.callbacks, moe_heads.lightning_modules)


def public_docstrings(package: ModuleType) -> Iterator[tuple[str, str, set[str]]]:
    """Yield the name and docstring of public objects and methods, with the names of their arguments and members."""
    for name in package.__all__:
        value: Any = getattr(package, name)
        if not callable(value):  # a constant has the docstring of its type
            continue
        inside = {*dir(value), *getattr(value, "__annotations__", ())}
        if not isinstance(value, type) or not issubclass(value, dict):  # a TypedDict has no signature
            inside |= set(inspect.signature(value).parameters)
        yield name, inspect.getdoc(value) or "", inside
        for member, attribute in vars(value).items() if inspect.isclass(value) else ():
            function = attribute.fget if isinstance(attribute, property) else attribute
            if inspect.isfunction(function) and not member.startswith("_"):
                yield f"{name}.{member}", inspect.getdoc(function) or "", inside


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: str(package.__name__))
def test_public_docstrings_refer_to_public_names(package: ModuleType) -> None:
    public = {name for other in PACKAGES for name in other.__all__}
    foreign = {"lightning", "moe_heads", "torch", "torchmetrics"}
    for name, text, inside in public_docstrings(package):
        found = re.findall(r"(?<![`:\w])`([A-Za-z_][\w.]*)`(?!`)", text)
        unknown = {reference for reference in found if reference.partition(".")[0] not in public | foreign | inside}
        assert not unknown, f"{name} refers to {unknown}, which are not public"


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

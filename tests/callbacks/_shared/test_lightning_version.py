"""One clear warning about a version of Lightning that was not tested."""

import importlib
import sys
import tomllib
import types
import warnings
from collections.abc import Iterator
from importlib import metadata

import pytest

from moe_heads.callbacks import _shared
from moe_heads.callbacks._shared import lightning_version
from moe_heads.callbacks._shared.lightning_version import TESTED, warn_if_untested
from tests.support.sources import ROOT


@pytest.fixture(autouse=True)
def _forget_warnings() -> Iterator[None]:
    lightning_version._warn_if_outside.cache_clear()
    yield
    lightning_version._warn_if_outside.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.delitem(sys.modules, "pytorch_lightning", raising=False)
    monkeypatch.setattr(metadata, "version", lambda name: version)


@pytest.mark.parametrize("version", ["2.7.0", "2.7.0rc1", "2.10", "3.0.dev20270101", "2.5.6"])
def test_a_version_outside_the_range_gets_one_warning(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, version)
    with pytest.warns(UserWarning) as caught:
        warn_if_untested()
        warn_if_untested()
    (message,) = (str(warning.message) for warning in caught)
    assert message.startswith(f"lightning: expected >=2.6,<2.7, got {version}. ")
    assert "`pip install 'lightning>=2.6,<2.7'`" in message


@pytest.mark.parametrize("version", ["2.6", "2.6.0", "2.6.6", "2.6.7rc1", "2.6.1.post0", "2.6.0+local"])
def test_a_version_in_the_range_gets_none(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, version)
    warn_if_untested()


def test_importing_the_callbacks_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "2.7.1")
    with pytest.warns(UserWarning, match=r"^lightning: expected >=2.6,<2.7, got 2.7.1\."):
        importlib.reload(_shared)  # every module with private parts is below this package


def test_the_second_package_counts_if_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "2.6.6")
    warn_if_untested()
    other = types.ModuleType("pytorch_lightning")
    other.__version__ = "2.8.0"
    monkeypatch.setitem(sys.modules, "pytorch_lightning", other)
    with pytest.warns(UserWarning, match=r"^pytorch_lightning: expected .*, got 2.8.0\. .* 'pytorch_lightning>="):
        warn_if_untested()


def test_a_missing_package_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    install(monkeypatch, "")
    monkeypatch.setattr(metadata, "version", missing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested()


def test_the_range_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"lightning{TESTED}" in project["dependencies"]
    assert f"pytorch-lightning{TESTED}" in project["optional-dependencies"]["dev"]

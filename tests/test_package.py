"""The package as people get it: import names, arrows between the rooms, the wheel's contents."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.sources import ROOT, sources

# What each room may import of ours, the most specific name deciding.
_HEADS = {
    "moe_heads.checks",
    "moe_heads.routing",
    "moe_heads.routers",
    "moe_heads.capacity",
    "moe_heads.experts",
    "moe_heads.flops",
    "moe_heads.head",
    "moe_heads.moe_layer",
    "moe_heads.routed_module",
    "moe_heads.surgery",
}
_HESSIAN = "moe_heads.analysis.sharpness.hessian"
_MATCHING = "moe_heads.analysis.weight_matching"
_SHARED = "moe_heads.analysis._shared"
ALLOWED = {
    "moe_heads": {"moe_heads"},
    "moe_heads.lightning_modules": {"moe_heads", "moe_heads.lightning_modules"},
    "moe_heads.analysis": {
        "moe_heads.analysis.critical_sharpness",
        "moe_heads.analysis.expert_utilization",
        "moe_heads.analysis.inference_timing",
        "moe_heads.analysis.loss_landscape",
        "moe_heads.analysis.sharpness",
        _SHARED,
    },
    _SHARED: {_SHARED, *_HEADS},
    "moe_heads.analysis.critical_sharpness": {"moe_heads.analysis.critical_sharpness", _SHARED, *_HEADS},
    "moe_heads.analysis.expert_utilization": {"moe_heads.analysis.expert_utilization", _SHARED, *_HEADS},
    "moe_heads.analysis.inference_timing": {"moe_heads.analysis.inference_timing", _SHARED, *_HEADS},
    "moe_heads.analysis.loss_landscape": {"moe_heads.analysis.loss_landscape", _HESSIAN, _SHARED, *_HEADS},
    "moe_heads.analysis.sharpness": {
        "moe_heads.analysis.loss_landscape",
        "moe_heads.analysis.sharpness",
        _HESSIAN,
        _SHARED,
        *_HEADS,
    },
    _HESSIAN: {_HESSIAN, _SHARED, *_HEADS},
    _MATCHING: {
        _MATCHING,
        _HESSIAN,
        _SHARED,
        *_HEADS,
        "moe_heads.soft_moe",
        "moe_heads.sparse_mixture",
    },
    "moe_heads.commands": {
        "moe_heads.commands",
        "moe_heads.callbacks",
        "moe_heads.analysis",
        _MATCHING,
        _SHARED,
    },
    "moe_heads.cli": {"moe_heads.commands"},
    "moe_heads.callbacks": {
        "moe_heads.callbacks",
        "moe_heads.analysis",
        "moe_heads.analysis.critical_sharpness",
        "moe_heads.analysis.expert_utilization",
        "moe_heads.analysis.inference_timing",
        "moe_heads.analysis.loss_landscape",
        "moe_heads.analysis.sharpness",
        _HESSIAN,
        _SHARED,
        "moe_heads.checks",
        "moe_heads.routing",
        "moe_heads.capacity",
    },
}
FOREIGN = {
    "moe_heads": {"torch"},
    "moe_heads.analysis": {"torch", "numpy", "matplotlib", "scipy", "typing_extensions"},
    "moe_heads.analysis.expert_utilization.metric": {"torch", "torchmetrics"},
    "moe_heads.analysis.sharpness.pyhessian": {"torch", "pyhessian"},
    "moe_heads.cli": {"jsonargparse", "lightning"},
    "moe_heads.commands": {"torch", "numpy", "matplotlib", "lightning", "typing_extensions"},
}

DATA_FILES = {"moe_heads/py.typed", "moe_heads/analysis/loss_landscape/page.html"}


@cache
def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from moe_heads import balance` imports a module
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inside & set(sources())) or {str(node.module)}
    return names


def room_of(name: str, rooms: Iterable[str]) -> str | None:
    return max((room for room in rooms if f"{name}.".startswith(f"{room}.")), key=len, default=None)


def is_below(name: str, packages: set[str]) -> bool:
    """Whether the name's own room, the most specific there is, is among the packages."""
    if name in packages:
        return True
    return room_of(name, {*packages, *ALLOWED}) in packages


@pytest.mark.parametrize("name", [name for name in sources() if not name.startswith("examples")])
def test_arrows_point_one_way(name: str) -> None:
    path = sources()[name]
    ours = {imported for imported in imports(path) if imported.partition(".")[0] == "moe_heads"}
    room = room_of(name, ALLOWED)
    assert room is not None
    wrong = {imported for imported in ours if not is_below(imported, ALLOWED[room])}
    assert not wrong, f"{name} may not import {wrong}"


def test_no_circle_between_modules() -> None:
    arrows = {name: imports(path) & set(sources()) - {name} for name, path in sources().items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for target in sorted(arrows[name]):
                # a package's __init__ is a shop window: it imports its modules, they never import it
                visit(target, (*trail, name))
            done.add(name)

    for name in arrows:
        visit(name, ())


@pytest.mark.parametrize("name", [name for name in sources() if room_of(name, FOREIGN)])
def test_rooms_import_no_foreign_package_they_should_not_know(name: str) -> None:
    room = room_of(name, FOREIGN)
    assert room is not None
    if room == "moe_heads" and name.startswith(("moe_heads.callbacks", "moe_heads.lightning_modules")):
        return  # what they may import is in pyproject.toml
    foreign = {imported.partition(".")[0] for imported in imports(sources()[name])} - set(sys.stdlib_module_names)
    assert foreign <= FOREIGN[room] | {"moe_heads"}


def run(code: str, folder: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_heads_loads_neither_lightning_nor_torchvision(tmp_path: Path) -> None:
    code = "import sys, moe_heads; print([n for n in ('lightning', 'torchvision', 'matplotlib') if n in sys.modules])"
    assert run(code, tmp_path) == "[]"


def test_no_bare_callbacks_package_is_installed(tmp_path: Path) -> None:
    code = "import importlib.util as u; print([n for n in ('callbacks', 'lightning_modules') if u.find_spec(n)])"
    assert run(code, tmp_path) == "[]"


def test_public_names_exist() -> None:
    import moe_heads
    import moe_heads.analysis
    import moe_heads.callbacks
    import moe_heads.lightning_modules

    for package in (moe_heads, moe_heads.callbacks, moe_heads.analysis, moe_heads.lightning_modules):
        assert all(hasattr(package, name) for name in package.__all__)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the source distribution of a copy: a build folder in the tree would add what it holds."""
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in ("moe_heads", "callbacks", "lightning_modules"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_module_and_py_typed(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{name.replace('.', '/')}/__init__.py" if path.name == "__init__.py" else f"{name.replace('.', '/')}.py"
        for name, path in sources().items()
        if not name.startswith("examples")
    }
    assert {name for name in inside if ".dist-info/" not in name} == expected | DATA_FILES
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_wheel_works_outside_the_repository_and_in_its_root(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    names = ["moe_heads.analysis.sharpness.hessian", "moe_heads.lightning_modules.classifier"]
    # without the import hook of the editable install that the tests run in
    code = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'Editable' not in str(finder)]\n"
        f"from importlib.util import find_spec; print([find_spec(name).origin for name in {names}])"
    )
    site = tmp_path / "site"
    for folder, home in ((tmp_path, site), (ROOT, ROOT)):
        origins = ast.literal_eval(run(code, folder, PYTHONPATH=str(site)))
        assert all(Path(origin).is_relative_to(home) for origin in origins)


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-lowest.txt"])
def test_constraints_pin_names_and_versions_only(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins
    assert all(len(pin.split("==")) == 2 and "/" not in pin and "@" not in pin for pin in pins)


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [requirement for group in project["optional-dependencies"].values() for requirement in group]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    names = {requirement.split("[")[0].split(">")[0] for requirement in [*project["dependencies"], *extras]}
    assert names - {"moe-heads"} <= pinned


def test_the_lowest_constraints_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = {Requirement(line) for group in groups for line in group if not line.startswith("moe-heads")}
    pins = dict(line.split("==") for line in (ROOT / "constraints-lowest.txt").read_text().splitlines() if "==" in line)
    for requirement in requirements:
        (bound,) = (spec.version for spec in requirement.specifier if spec.operator == ">=")
        pin = Version(pins[canonicalize_name(requirement.name)])
        # the first release may have one more number: 6.130 is 6.130.0
        assert pin in requirement.specifier and pin.release[: len(Version(bound).release)] == Version(bound).release


def test_a_package_and_its_function_share_a_name() -> None:
    """``from moe_heads.analysis import sharpness`` is the function, whatever was imported before."""
    code = """
from moe_heads.analysis.sharpness.result import SharpnessResult
from moe_heads.analysis import expert_utilization, inference_timing, loss_landscape, sharpness
from moe_heads.analysis.sharpness.hessian import HessianOperator
import moe_heads.analysis
functions = (expert_utilization, inference_timing, loss_landscape, sharpness, moe_heads.analysis.sharpness)
print([function.__name__ for function in functions])
"""
    assert run(code, ROOT) == str([
        "expert_utilization",
        "inference_timing",
        "loss_landscape",
        "sharpness",
        "sharpness",
    ])


def test_the_analyses_load_neither_lightning_nor_torchmetrics() -> None:
    code = "import sys, moe_heads.analysis; print([n for n in ('lightning', 'torchmetrics') if n in sys.modules])"
    assert run(code, ROOT) == "[]"


@pytest.mark.parametrize("name", [name for name in sources() if name.startswith("moe_heads.callbacks")])
def test_one_file_uses_private_parts_of_a_trainer(name: str) -> None:
    """A private attribute belongs to self or to a class of the same file, except in the two files for Trainers."""
    tree = ast.parse(sources()[name].read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) > 1]
    used |= {
        str(call.args[1].value)
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "getattr" and isinstance(call.args[1], ast.Constant)
    }
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    of_self = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
    }
    foreign = {attribute for attribute in used - own - of_self if attribute.startswith("_") and attribute[:2] != "__"}
    assert name.endswith(("trainer_access", "transformers_access")) or foreign <= {"_dynamo"}, foreign

"""Find the two sub-packages that lie beside this folder in a source tree and inside it in an installation."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

__all__ = ["find_packages_beside"]


class _Finder(MetaPathFinder):
    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder = self.folders.get(fullname)
        if folder is None:
            return None
        return spec_from_file_location(fullname, folder / "__init__.py", submodule_search_locations=[str(folder)])


def find_packages_beside(package: Path) -> None:
    """Make ``moe_heads.callbacks`` and ``moe_heads.lightning_modules`` importable from a source tree.

    Started in the root of the repository, Python finds the folder ``moe_heads`` there before an installed wheel.
    Nothing is done in an installation, where the sub-packages lie inside.
    """
    root = package.parent
    names = [name for name in ("callbacks", "lightning_modules") if not (package / name).is_dir()]
    if names and (root / "pyproject.toml").is_file():
        # first: another source tree may be installed editable, with a finder of its own
        sys.meta_path.insert(0, _Finder({f"{package.name}.{name}": root / name for name in names}))

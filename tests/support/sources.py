"""The source files by the name under which they are imported."""

from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

_ROOMS = {
    "moe_heads": "moe_heads",
    "lightning_modules": "moe_heads.lightning_modules",
    "callbacks": "moe_heads.callbacks",
    "examples": "examples",
}


@cache
def sources() -> dict[str, Path]:
    """Source files by module name."""
    found = {}
    for folder, package in _ROOMS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found

"""The source files by the name under which they are imported."""

import os
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@cache
def sources() -> dict[str, Path]:
    """Source files by module name."""
    found = {}
    for package in ("moe_heads", "examples"):
        # two sub-packages are links to folders at the top level
        for folder, _, files in sorted(os.walk(ROOT / package, followlinks=True)):
            for path in sorted(Path(folder, file) for file in files if file.endswith(".py")):
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(part for part in parts if part != "__init__")] = path
    return found

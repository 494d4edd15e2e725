"""Mixture-of-experts classifier heads; the analyses and the Lightning side live in the sub-packages."""

from pathlib import Path

_here = Path(__file__).resolve().parent
# Started in the root of a source tree, Python finds this folder before an installed wheel, and the two sub-packages
# lie beside it instead of inside it: look there too.
if not (_here / "callbacks").is_dir() and (_here.parent / "pyproject.toml").is_file():
    __path__.append(str(_here.parent))

"""Warning about a version of Lightning whose private parts were not checked."""

import contextlib
import functools
import re
import sys
import warnings
from importlib import metadata

__all__ = ["TESTED", "warn_if_untested"]

# That of pyproject.toml: a test compares them. The metadata of the installed package may be missing or older.
TESTED = ">=2.6,<2.7"


def warn_if_untested() -> None:
    """Warn once about each installed Lightning that is not in the tested range.

    Pip keeps Lightning in this range, except with ``--no-deps`` or after a later upgrade. Most parts work with other
    versions too, so this is no error. ``pytorch_lightning`` counts only if the program has imported it.
    """
    with contextlib.suppress(metadata.PackageNotFoundError):
        _warn_if_outside("lightning", metadata.version("lightning"))
    if "pytorch_lightning" in sys.modules:
        _warn_if_outside("pytorch_lightning", str(sys.modules["pytorch_lightning"].__version__))


@functools.cache  # one warning for each package and version
def _warn_if_outside(package: str, version: str) -> None:
    lowest, too_new = (_minor(bound) for bound in TESTED.split(","))
    if not lowest <= _minor(version) < too_new:
        warnings.warn(
            f"{package}: expected {TESTED}, got {version}. The callbacks use private parts of Lightning, which may"
            f" differ in this version. Install a tested one with `pip install '{package}{TESTED}'`.",
            stacklevel=2,
        )


def _minor(version: str) -> tuple[int, ...]:
    """Return the first two numbers, so that pre-releases belong to the version that they precede."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])

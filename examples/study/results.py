"""Runs in the folder of a study: read finished ones and check whether others may be resumed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study.options import Options
from study.presets import HEADS
from study.storage import replace

Run = dict[str, Any]
"""Stored result of `study.run.run`."""

_FIELDS = ("head", "seed", "config", "capacity", "metrics", "lines", "loads", "machine")


def heads_of(runs: Sequence[Run]) -> list[str]:
    """Return the heads with a run, in the order of the study."""
    return [head for head in HEADS if any(run["head"] == head for run in runs)]


def check_new(options: Options) -> None:
    """Raise an error if the folder holds runs and ``--resume`` is not given.

    Raises:
        ValueError: If there are runs without ``--resume``.
    """
    if not options.resume and _folders(options.out):
        raise ValueError(
            f"--out: expected a folder without runs, got {str(options.out)!r}. Pass --resume or another folder."
        )


def finished(out: Path, config: dict[str, Any]) -> dict[tuple[str, int], Run]:
    """Read all finished runs in the folder of a study, including heads and seeds that are not selected now.

    Args:
        out: Folder of the study.
        config: Options that all runs of the folder have to share; see `Options.config`.

    Raises:
        ValueError: If a run was made with different options.
    """
    found = {}
    for key, folder in _folders(out).items():
        if (folder / "result.json").exists():
            found[key] = load(folder, config)
        else:
            check_begun(folder, config)
    return found


def check_begun(folder: Path, config: dict[str, Any]) -> None:
    """Check that a started run has the same options.

    Raises:
        ValueError: If they differ.
    """
    path = folder / "config.json"
    if path.exists():
        _check(path, _read(path), config)


def load(folder: Path, config: dict[str, Any]) -> Run:
    """Read a finished run.

    Raises:
        ValueError: If the file is damaged, or was made with different options.
    """
    path = folder / "result.json"
    result = _read(path)
    _check(path, result.get("config"), config)
    if missing := [name for name in _FIELDS if name not in result]:
        raise ValueError(
            f"--resume: expected a complete result, got {path} without {', '.join(missing)}. {_remedy(path)}"
        )
    return result


def begin(folder: Path, config: dict[str, Any]) -> None:
    """Save the options of a run at its start, so that it is not resumed with different ones."""
    replace(folder / "config.json", json.dumps(config, indent=1))


def _folders(out: Path) -> dict[tuple[str, int], Path]:
    """Return the folders of runs by head and seed, in this order."""
    found = {}
    for folder in out.glob("*/seed*"):
        head, seed = folder.parent.name, folder.name.removeprefix("seed")
        if head in HEADS and seed.isdigit():
            found[head, int(seed)] = folder
    return dict(sorted(found.items(), key=lambda item: (HEADS.index(item[0][0]), item[0][1])))


def _read(path: Path) -> Run:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--resume: {path} is damaged: {error}. {_remedy(path)}") from error
    if not isinstance(result, dict):
        raise ValueError(f"--resume: {path} is damaged: it is not a JSON object. {_remedy(path)}")
    return result


def _remedy(path: Path) -> str:
    """Return the remedy for a damaged file: without its config, the training of a run cannot be used."""
    return "Remove its folder." if path.name == "config.json" else "Remove the file; the training is kept."


def _check(path: Path, made_with: Any, config: dict[str, Any]) -> None:
    if not isinstance(made_with, dict):
        raise ValueError(f"--resume: expected options in {path}, got none. {_remedy(path)}")
    wanted = json.loads(json.dumps(config))
    differing = sorted(name for name in wanted if made_with.get(name) != wanted[name])
    if differing:
        listed = ", ".join(f"{name}={made_with.get(name)!r} (now {wanted[name]!r})" for name in differing)
        raise ValueError(f"--resume: {path} was made with {listed}. Pass the same options or another --out.")

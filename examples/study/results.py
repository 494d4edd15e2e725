"""The runs of a study's folder: which are finished, and whether the others may be carried on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study.options import Options
from study.presets import HEADS
from study.storage import replace

Run = dict[str, Any]
"""What `study.run.run` stores of a run."""

_FIELDS = ("head", "seed", "config", "capacity", "metrics", "lines", "loads", "machine")


def heads_of(runs: Sequence[Run]) -> list[str]:
    """Heads that have a run, in the order of the study."""
    return [head for head in HEADS if any(run["head"] == head for run in runs)]


def check_new(options: Options) -> None:
    """Refuse to work in a folder that holds runs, unless they are to be kept.

    Raises:
        ValueError: If there are runs without ``--resume``.
    """
    if not options.resume and _folders(options.out):
        raise ValueError(f"--out: {str(options.out)!r} holds runs already; pass --resume or another folder")


def finished(out: Path, config: dict[str, Any]) -> dict[tuple[str, int], Run]:
    """Results of all finished runs in the study's folder, also of heads and seeds that are not asked for now.

    Args:
        out: Folder of the study.
        config: What every run of the folder has to agree with, see `Options.config`.

    Raises:
        ValueError: If a run was made with other options.
    """
    found = {}
    for key, folder in _folders(out).items():
        if (folder / "result.json").exists():
            found[key] = load(folder, config)
        else:
            check_begun(folder, config)
    return found


def check_begun(folder: Path, config: dict[str, Any]) -> None:
    """Refuse to carry on a run that began with other options.

    Raises:
        ValueError: If it did.
    """
    path = folder / "config.json"
    if path.exists():
        _check(path, _read(path), config)


def load(folder: Path, config: dict[str, Any]) -> Run:
    """A finished run.

    Raises:
        ValueError: If the file is damaged, or made with other options.
    """
    path = folder / "result.json"
    result = _read(path)
    _check(path, result.get("config"), config)
    if missing := [name for name in _FIELDS if name not in result]:
        raise ValueError(f"--resume: {path} lacks {', '.join(missing)}; {_remedy(path)}")
    return result


def begin(folder: Path, config: dict[str, Any]) -> None:
    """Write down with which options a run begins, so that it is not carried on with others."""
    replace(folder / "config.json", json.dumps(config, indent=1))


def _folders(out: Path) -> dict[tuple[str, int], Path]:
    """Folders of runs by head and seed, in this order."""
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
        raise ValueError(f"--resume: {path} is not what a run has written ({error}); {_remedy(path)}") from error
    if not isinstance(result, dict):
        raise ValueError(f"--resume: {path} is not what a run has written; {_remedy(path)}")
    return result


def _remedy(path: Path) -> str:
    """What to do about a damaged file: a training outlives its result, but not the words that say what it was."""
    return "remove its folder" if path.name == "config.json" else "remove the file: the training is kept"


def _check(path: Path, made_with: Any, config: dict[str, Any]) -> None:
    if not isinstance(made_with, dict):
        raise ValueError(f"--resume: {path} does not say what it was made with; {_remedy(path)}")
    asked = json.loads(json.dumps(config))
    differing = sorted(name for name in asked if made_with.get(name) != asked[name])
    if differing:
        told = ", ".join(f"{name}={made_with.get(name)!r} (now {asked[name]!r})" for name in differing)
        raise ValueError(f"--resume: {path} was made with {told}; pass the same options or another --out")

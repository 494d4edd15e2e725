"""The runs of a study's folder: which are finished, and whether the others may be carried on."""

import json
from pathlib import Path
from typing import Any

from study.options import Options
from study.storage import replace

Run = dict[str, Any]
"""What `study.run.run` stores of a run."""


def finished(options: Options, config: dict[str, Any]) -> dict[tuple[str, int], Run]:
    """Results of the finished runs in the study's folder.

    Args:
        options: What is asked for.
        config: What every run has to agree with, see `Options.config`.

    Raises:
        ValueError: If there are runs without ``--resume``, or some were made with other options.
    """
    found = {}
    for head in options.heads:
        for seed in range(options.seeds):
            folder = options.run_dir(head, seed)
            if folder.exists() and not options.resume:
                raise ValueError(f"--out: {str(options.out)!r} holds runs already; pass --resume or another folder")
            if (folder / "result.json").exists():
                found[head, seed] = load(folder, config)
            elif (folder / "config.json").exists():
                _check(folder / "config.json", _read(folder / "config.json"), config)
    return found


def load(folder: Path, config: dict[str, Any]) -> Run:
    """A finished run.

    Raises:
        ValueError: If the file is damaged, or made with other options.
    """
    path = folder / "result.json"
    result = _read(path)
    _check(path, result.get("config"), config)
    return result


def begin(folder: Path, config: dict[str, Any]) -> None:
    """Write down with which options a run begins, so that it is not carried on with others."""
    replace(folder / "config.json", json.dumps(config, indent=1))


def _read(path: Path) -> Run:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--resume: {path} is not the result of a run ({error}); remove its folder") from error
    if not isinstance(result, dict):
        raise ValueError(f"--resume: {path} is not the result of a run; remove its folder")
    return result


def _check(path: Path, made_with: Any, config: dict[str, Any]) -> None:
    if not isinstance(made_with, dict):
        raise ValueError(f"--resume: {path} does not say what it was made with; remove its folder")
    asked = json.loads(json.dumps(config))
    differing = sorted(name for name in asked if made_with.get(name) != asked[name])
    if differing:
        told = ", ".join(f"{name}={made_with.get(name)!r} (now {asked[name]!r})" for name in differing)
        raise ValueError(f"--resume: {path} was made with {told}; pass the same options or another --out")

"""Folders that ``moe-heads analyze`` has written."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_heads.commands.analyze import FORMAT, RESULT
from moe_heads.commands.errors import CommandError

__all__ = ["Run", "read_runs"]


@dataclass(frozen=True)
class Run:
    """Results of one checkpoint.

    Attributes:
        label: Short name on the page.
        folder: Its folder.
        content: Content of ``result.json``.
    """

    label: str
    folder: Path
    content: dict[str, Any]

    def split(self, analysis: str, split: str) -> dict[str, Any] | None:
        """Return the numbers of an analysis of a split, or None."""
        found: dict[str, Any] | None = self.content["analyses"].get(analysis, {}).get(split)
        return found


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Read folders and give them labels.

    Raises:
        CommandError: If there are fewer than two, or one has no results.
    """
    if len(folders) < 2:
        raise CommandError(f"dirs: expected at least two folders, got {len(folders)}.")
    paths = [Path(folder) for folder in folders]
    short = [path.resolve().name for path in paths]
    labels = [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]
    if len(set(labels)) < len(labels):
        raise CommandError(f"dirs: expected different folders, got {', '.join(labels)}.")
    return [Run(label, path, _content(path)) for label, path in zip(labels, paths, strict=True)]


def _content(folder: Path) -> dict[str, Any]:
    path = folder / RESULT
    if not path.is_file():
        raise CommandError(f"dirs: expected a folder that `moe-heads analyze` has written, got {str(folder)!r}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(f"dirs: expected JSON in {str(path)!r}, got {error}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise CommandError(
            f"dirs: expected format {FORMAT} in {str(path)!r}, got {found}: analyze the checkpoint again."
        )
    return content

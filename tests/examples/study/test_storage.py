"""Atomic writes of files, and locks of folders."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from study.storage import claimed, replace

from tests.support.sources import ROOT


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    replace(path, "old")
    write = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        write(self, content[:1])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        replace(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / "examples")!r})
from pathlib import Path
from study.storage import claimed
with claimed(Path({str(tmp_path / "run")!r})) as mine:
    print(mine)
"""
    ask = [sys.executable, "-c", code]
    with claimed(tmp_path / "run") as mine:
        assert mine
        assert subprocess.run(ask, capture_output=True, text=True, check=True).stdout == "False\n"
    assert subprocess.run(ask, capture_output=True, text=True, check=True).stdout == "True\n"

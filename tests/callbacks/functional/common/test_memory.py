from pathlib import Path

import pytest

from moe_heads.callbacks.functional.common import memory


def test_the_smaller_of_what_machine_and_container_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"machine": 5000, "container": None}
    monkeypatch.setattr(memory, "_of_the_machine", lambda: known["machine"])
    monkeypatch.setattr(memory, "_of_the_container", lambda: known["container"])
    assert memory.available_memory() == 5000
    known["container"] = 300
    assert memory.available_memory() == 300
    known |= {"machine": None, "container": None}
    assert memory.available_memory() is None


def test_what_the_kernel_says(tmp_path: Path) -> None:
    told = tmp_path / "meminfo"
    assert memory._of_the_machine(told) is None
    told.write_text("MemTotal:       100 kB\nMemAvailable:    40 kB\nHugePages_Total:   0\n")
    assert memory._of_the_machine(told) == 40 * 1024
    told.write_text("MemTotal:       100 kB\n")
    assert memory._of_the_machine(told) is None


@pytest.mark.parametrize(
    ("limit", "used", "left"),
    [("max\n", "10\n", None), ("100\n", "30\n", 70), ("100\n", "130\n", 0), (None, None, None)],
)
def test_what_the_container_leaves(tmp_path: Path, limit: str | None, used: str | None, left: int | None) -> None:
    if limit is not None and used is not None:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text(used)
    assert memory._of_the_container(tmp_path) == left

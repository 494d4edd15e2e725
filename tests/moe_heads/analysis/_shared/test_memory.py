from pathlib import Path

import pytest
import torch

from moe_heads.analysis._shared import memory


def test_the_smaller_of_what_machine_and_container_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"machine": 5000, "container": None}
    monkeypatch.setattr(memory, "_of_the_machine", lambda: known["machine"])
    monkeypatch.setattr(memory, "_of_the_groups", lambda: iter([None, known["container"]]))
    assert memory.available_memory() == 5000
    known["container"] = 300
    assert memory.available_memory() == 300
    known |= {"machine": None, "container": None}
    assert memory.available_memory() is None


def test_free_memory_from_files_of_the_kernel(tmp_path: Path) -> None:
    warned = tmp_path / "meminfo"
    assert memory._of_the_machine(warned) is None
    warned.write_text("MemTotal:       100 kB\nMemAvailable:    40 kB\nHugePages_Total:   0\n")
    assert memory._of_the_machine(warned) == 40 * 1024
    warned.write_text("MemTotal:       100 kB\n")
    assert memory._of_the_machine(warned) is None


def group(folder: Path, limit: str, used: int, cached: int, *, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\nactive_file 7\n")


def left(tmp_path: Path, line: str) -> list[int]:
    (tmp_path / "cgroup").write_text(line)
    return [number for number in memory._of_the_groups(tmp_path / "cgroup", tmp_path / "fs") if number is not None]


def test_the_groups_around_a_process_bound_it(tmp_path: Path) -> None:
    group(tmp_path / "fs" / "job", "1000", 900, 300)  # files that were read can be forgotten
    group(tmp_path / "fs" / "job" / "step", "max", 900, 300)
    assert left(tmp_path, "0::/job/step\n") == [400]
    group(tmp_path / "fs", "200", 500, 0)  # a container sees its limit at the root
    assert left(tmp_path, "0::/unknown/here\n") == [0]


def test_first_version_of_control_groups(tmp_path: Path) -> None:
    group(tmp_path / "fs" / "memory" / "docker" / "a", "1000", 900, 50, version=1)
    lines = "7:cpu,cpuacct:/docker/a\n5:memory:/docker/a\n"
    assert left(tmp_path, lines) == [150]


def test_no_groups(tmp_path: Path) -> None:
    assert list(memory._of_the_groups(tmp_path / "nothing", tmp_path)) == []


def test_budget_is_half_of_what_is_free_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for free, expected in ((None, 100), (1000, 100), (120, 60)):
        monkeypatch.setattr(memory, "available_memory", lambda free=free: free)
        assert memory.memory_budget(cpu, on_cpu=100, share_of_gpu=0.5) == expected

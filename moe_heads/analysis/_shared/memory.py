"""Free memory of the machine."""

from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["available_memory", "memory_budget"]


def memory_budget(device: torch.device, *, on_cpu: int, share_of_gpu: float) -> int:
    """Return the default number of bytes that an analysis may keep.

    Args:
        device: Device of the model.
        on_cpu: Bytes on a CPU, limited to half of the free memory.
        share_of_gpu: Fraction of the free memory on a GPU.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * share_of_gpu)
    free = available_memory()
    return on_cpu if free is None else min(on_cpu, free // 2)


def available_memory() -> int | None:
    """Return the bytes that this process can still allocate, or None if the system does not report it.

    Considers the free memory of the machine and the limits of the process's control groups (containers, jobs).
    """
    known = [bytes_ for bytes_ in (_of_the_machine(), *_of_the_groups()) if bytes_ is not None]
    return min(known, default=None)


def _of_the_machine(path: Path = Path("/proc/meminfo")) -> int | None:
    if not path.exists():
        return None
    fields = dict(line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _of_the_groups(
    groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> Iterator[int | None]:
    """Read the remaining memory of the process's control group and of the groups that contain it.

    Yields:
        Bytes, or None for a group without a limit.
    """
    if not groups.exists():
        return
    for line in groups.read_text(encoding="utf-8").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2: one tree for all
            names, root = ("memory.max", "memory.current", "inactive_file"), mount
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = mount / "memory"
        else:
            continue
        inside = root / path.lstrip("/")
        # a container may not have access to its own path, but to the root of the mount
        for folder in dict.fromkeys([inside, *inside.parents, root]):
            if folder == root or root in folder.parents:
                yield _left(folder, *names)


def _left(folder: Path, limit_name: str, used_name: str, reclaimable: str) -> int | None:
    try:
        limit = (folder / limit_name).read_text(encoding="ascii").strip()
        used = int((folder / used_name).read_text(encoding="ascii"))
        statistics = (folder / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    # the kernel counts reclaimable file cache as used
    cached = dict(line.split() for line in statistics.splitlines()).get(reclaimable, "0")
    return max(int(limit) - used + int(cached), 0)

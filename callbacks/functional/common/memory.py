"""How much memory of the machine is free."""

from pathlib import Path

__all__ = ["available_memory"]


def available_memory() -> int | None:
    """Bytes that this process can still get, by the kernel and by the limit of its container; None where not told."""
    known = [bytes_ for bytes_ in (_of_the_machine(), _of_the_container()) if bytes_ is not None]
    return min(known, default=None)


def _of_the_machine(path: Path = Path("/proc/meminfo")) -> int | None:
    if not path.exists():
        return None
    fields = dict(line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _of_the_container(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    limit, used = folder / "memory.max", folder / "memory.current"
    if not limit.exists() or not used.exists() or limit.read_text().strip() == "max":
        return None
    return max(int(limit.read_text()) - int(used.read_text()), 0)

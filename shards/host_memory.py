"""How much memory this machine has left, by the kernel's count and the container's limit."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFiles:
    """Where the kernel tells of memory."""

    meminfo: Path = Path("/proc/meminfo")
    limit: Path = Path("/sys/fs/cgroup/memory.max")
    used: Path = Path("/sys/fs/cgroup/memory.current")
    stat: Path = Path("/sys/fs/cgroup/memory.stat")


def available_memory(files: MemoryFiles | None = None) -> int | None:
    """Bytes that may still be taken: what the kernel calls available, capped by the container's limit.

    None where the kernel does not say (not Linux).
    """
    files = files or MemoryFiles()
    if not files.meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in files.meminfo.read_text().splitlines() if ":" in line)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    if files.limit.exists() and files.used.exists() and files.limit.read_text().strip() != "max":
        used = int(files.used.read_text()) - _reclaimable(files.stat)
        available = min(available, max(0, int(files.limit.read_text()) - used))
    return available


def _reclaimable(stat: Path) -> int:
    """File cache of the container that the kernel gives back on demand: a checkpoint just read is in it."""
    lines = stat.read_text().splitlines() if stat.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))

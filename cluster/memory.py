"""How much memory this machine has left, and a refusal of what does not fit."""

from dataclasses import dataclass
from pathlib import Path

from router.errors import ConfigError


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


def check_memory(*, kv_bytes: int, weight_bytes: int, ranks: int, available: int | None) -> None:
    """Refuse an engine whose KV and weights do not fit in this machine's memory.

    Args:
        kv_bytes: KV memory of one rank.
        weight_bytes: weights of all ranks together.
        ranks: ranks that run on this machine.
        available: from `available_memory`; None is not checked.

    Raises:
        ConfigError: names what is needed and what there is, and the option to lower.
    """
    needed = kv_bytes * ranks + weight_bytes
    if available is None or needed <= available:
        return
    most = max(0, available - weight_bytes) // ranks
    advice = f"lower kv_memory_bytes (--kv-memory) to at most {_size(most)}" if most else "use a larger machine"
    raise ConfigError(
        f"kv_memory_bytes={kv_bytes} does not fit: {ranks} rank(s) with {_size(kv_bytes)} of KV each and "
        f"{_size(weight_bytes)} of weights need {_size(needed)}, this machine has {_size(available)} available; "
        f"{advice}"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes} bytes ({num_bytes / (1 << 30):.2f} GiB)"

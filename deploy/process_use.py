"""What processes take of this machine: peak memory of a tree of them, and processor time of everybody else."""

import time

import psutil


def peak_rss_mb(pid: int) -> float:
    """Peak resident memory of a process and of its living descendants, each its own peak, summed, in MiB.

    Memory that they share counts once for each.
    """
    return sum(_peak_kb(process.pid) for process in _tree(pid)) / 1024


def _peak_kb(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            return next((int(line.split()[1]) for line in status if line.startswith("VmHWM:")), 0)
    except OSError:
        # It has ended meanwhile.
        return 0


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


class OthersCpu:
    """Processors that all others use while the context runs: how far its timings can be trusted."""

    def __init__(self) -> None:
        self.cpus = 0.0
        """Set at the end: 1.0 is one core all the time."""

    def __enter__(self) -> "OthersCpu":
        self._before = _others_s()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        # The kernel counts in steps of 10 ms.
        elapsed = max(time.perf_counter() - self._started, 0.02)
        self.cpus = max(0.0, _others_s() - self._before) / elapsed


def _others_s() -> float:
    """Processor seconds of the machine less those of this process, its living and its ended descendants."""
    machine = psutil.cpu_times()
    own = psutil.Process().cpu_times()
    mine = own.user + own.system + own.children_user + own.children_system
    mine += sum(_cpu_s(child) for child in psutil.Process().children(recursive=True))
    return machine.user + machine.nice + machine.system - mine


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system

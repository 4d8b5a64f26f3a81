"""The cores and the memory that a process may use on this machine, within the limits of its container."""

import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that this process may use: its CPU affinity, and the container's CPU quota where there is one."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    quota = _read(CGROUP / "cpu.max").split()  # "max 100000" or "150000 100000"
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def available_memory() -> int | None:
    """Bytes that can still be allocated before swapping, or None where the system does not say.

    The smaller of what the kernel estimates (MemAvailable) and what the container's limit leaves.
    """
    limits = []
    for line in _read(MEMINFO).splitlines():
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    limit, used = _read(CGROUP / "memory.max").strip(), _read(CGROUP / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        # Cached file contents count as used, but the kernel drops them when memory is needed.
        cached = [line.split()[1] for line in _read(CGROUP / "memory.stat").splitlines() if line.startswith("file ")]
        limits.append(max(0, int(limit) - int(used) + int(cached[0] if cached else 0)))
    return min(limits, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

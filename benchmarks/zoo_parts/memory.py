"""The memory of this process: its peak, and its limit."""

import resource
from pathlib import Path

GIB = 1 << 30


def peak() -> int:
    """The largest memory of the process since :func:`forget_peak`, in bytes (Linux; elsewhere since its beginning)."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Let the peak be what the process holds now, where the system can (not in a sandbox without that file, nor elsewhere)."""
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5")


def limit_memory(gib: float) -> None:
    """Let allocations of this process fail beyond ``gib``, so that a model that eats memory stops nothing else."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(gib * GIB), int(gib * GIB)))

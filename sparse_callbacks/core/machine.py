"""The machine that a figure was measured on."""

import os
import platform
from pathlib import Path


def processor_name() -> str:
    """The processor's name as Linux knows it; elsewhere what Python knows."""
    try:
        # platform.processor() is often empty on Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def processor() -> str:
    """The processor's name and its cores."""
    return f"{processor_name()}, {os.cpu_count()} cores"

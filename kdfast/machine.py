"""The machine and the versions that a result belongs to."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from kdfast.version import __version__


def facts() -> dict[str, Any]:
    """Processor, cores and threads, GPU where there is one, and versions: plain values, for JSON."""
    known: dict[str, Any] = {
        "kdfast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        known |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return known


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

"""Facts about the machine and the versions that a result was measured with."""

import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kdfast.version import __version__


def facts() -> dict[str, Any]:
    """Returns processor, cores, threads, GPU (if any) and versions as plain values, for JSON."""
    found: dict[str, Any] = {
        "kdfast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": package_version("triton")}
    return found


def document(cases: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """Returns the JSON of measurements: facts() and `more` of the machine, the date, and the cases."""
    return {"machine": facts() | more, "date": time.strftime("%Y-%m-%d"), "cases": cases}


def describe(facts: Mapping[str, Any], date: str) -> str:
    """Formats facts() in one line: the processor and its threads, or the GPU; the versions that matter; the date."""
    parts = [facts["cpu"], "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"]
    if "gpu" in facts:
        parts = [facts["gpu"], *(f"driver {gpu['driver_version']}" for gpu in facts.get("gpus", [])[:1])]
    return ", ".join([*parts, f"PyTorch {facts['torch']}", f"Python {facts['python']}", date])


def cores(root: Path = Path("/")) -> int:
    """Returns the number of processor cores that this process may use: as its affinity and the quotas of its control groups say.

    Args:
        root: the folder that holds proc/ and sys/.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, *_quotas(root))


def _quotas(root: Path) -> Iterator[int]:
    """Yields the cores that Linux's control groups allow, rounded up: this process' group and those above it, of version 2 and 1."""
    yield 2**31
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            folder = top / group.strip("/")
            for place in (folder, *folder.parents):
                if place.is_relative_to(top):  # in a container the group's path may not exist, and the container's own group is the top
                    with suppress(OSError, ValueError):
                        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
                        quota, period = map(int, " ".join((place / name).read_text() for name in names).split())
                        yield -(-quota // period) if quota > 0 else 2**31


_GPU = (
    "name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.draw", "power.limit",
    "temperature.gpu",
)  # fmt: skip


def gpus() -> list[dict[str, str]]:
    """Returns nvidia-smi's facts on each NVIDIA GPU: driver, memory (MiB), clocks (MHz), power (W), temperature (C); [] without it."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU)}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(_GPU, (value.strip() for value in line.split(",")))) for line in lines]


def package_version(package: str) -> str | None:
    """Returns the version of an installed package; None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

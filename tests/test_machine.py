"""Facts about the machine: the cores that a process may use."""

import os

import pytest

from kdfast.machine import cores

ALLOWED = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        pytest.param("0::/", {"cpu.max": "100000 100000"}, 1, id="version 2"),
        pytest.param("0::/", {"cpu.max": "50000 100000"}, 1, id="half a core"),
        pytest.param("0::/", {"cpu.max": "max 100000"}, ALLOWED, id="no quota"),
        pytest.param("0::/", {"cpu.max": "damaged"}, ALLOWED, id="damaged"),
        pytest.param("0::/", {"cpu.max": "100000000 100000"}, ALLOWED, id="more than there are"),
        pytest.param("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "100000 100000"}, 1, id="the group above"),
        pytest.param("0::/docker/x", {"cpu.max": "100000 100000"}, 1, id="a container's own group"),
        pytest.param("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"}, 1, id="version 1"),
        pytest.param("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, ALLOWED, id="version 1, no quota"),
        pytest.param("4:memory:/", {"cpu.max": "100000 100000"}, ALLOWED, id="of memory"),
        pytest.param(None, {}, ALLOWED, id="no groups"),
    ],
)
def test_cores_respect_the_quotas_of_control_groups(tmp_path, group, files, expected):
    if group is not None:
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(group + "\n")
    for name, text in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert cores(tmp_path) == expected

"""The wheel and the source distribution hold what users need, and a wheel can be built from the source distribution."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_from_the_source_distribution_holds_what_users_call(tmp_path):
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    clone = tmp_path / "clone"
    if subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=False).returncode:
        pytest.skip("this is no git clone, so its own files cannot be told from built ones")

    def run(*command: str, cwd: Path = tmp_path) -> str:
        return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, check=True).stdout

    run("setup.py", "-q", "sdist", "-d", str(tmp_path), cwd=clone)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        sources.extractall(tmp_path / "sources", filter="data")
    (sources,) = (tmp_path / "sources").iterdir()
    run("-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(tmp_path), str(sources))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        packed.extractall(tmp_path / "site")
    needed = {"py.typed", "optim/lion.py", "kernels/distill_kl.py", "kernels/lion_cpu.py", "benchmarks/operators.py", "report/page.html"}
    assert {f"kdfast/{name}" for name in needed} <= names
    unwanted = ("maintain", "tests/", "conftest", ".json", "test_")
    assert not [name for name in names if any(part in name for part in unwanted)]
    assert run("-c", "import kdfast.optim, kdfast.losses; print(kdfast.__file__)", cwd=tmp_path / "site").startswith(str(tmp_path / "site"))

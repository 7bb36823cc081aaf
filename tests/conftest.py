"""What every test shares: one thread (the runner starts a process a core), a fixed seed, a device, where the real images are."""

import os
from pathlib import Path

import pytest
import torch

from tests.numeric import DEVICE

torch.set_num_threads(1)
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(hash(request.node.name) % 2**31 if os.environ.get("KDFAST_FRESH_SEEDS") else 0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images: cifar-10-batches-py/, imagenette2-160/. Skips where there is none."""
    folder = Path(os.environ.get("KDFAST_DATA", Path(__file__).parents[2] / "data-unpacked"))
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} is not a folder; set KDFAST_DATA")
    return folder


@pytest.fixture(scope="session")
def oracles():
    """Values and gradients of the original implementations in float64, by name. Skips where they are absent."""
    import numpy as np

    path = Path(os.environ.get("KDFAST_ORACLES", Path(__file__).parents[2] / "shared" / "oracles" / "losses.npz"))
    if not path.is_file():
        pytest.skip(f"no oracles: {path} is not a file; set KDFAST_ORACLES")
    return np.load(path)


@pytest.fixture(autouse=True)
def _own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pytest started by a test is nobody's worker: pytest-benchmark, for one, measures nothing in a worker."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)

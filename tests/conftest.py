"""What every test shares: one thread (the runner starts a process a core), a fixed seed, where the real images are."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


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

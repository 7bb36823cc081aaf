"""What every test shares: one thread (the runner starts a process a core), a fixed seed, a device, where the real images are."""

import os
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from tests.numeric import DEVICE, INTERPRETED

torch.set_num_threads(1)
# fuzz draws the same cases in every run, so that a failure is the change's; KDFAST_FRESH_SEEDS draws others
hypothesis.settings.register_profile("kdfast", deadline=None, database=None, derandomize="KDFAST_FRESH_SEEDS" not in os.environ)
hypothesis.settings.load_profile("kdfast")
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)


def _round_as_a_gpu() -> None:
    """Triton's interpreter cuts float32 off to bfloat16, and before 3.9 it rounds a product before the sum of an fma."""
    import numpy as np
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, fma = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fma

    def rounded_cast(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            data = torch.from_numpy(src.data.copy()).bfloat16().view(torch.uint16).numpy()
            return TensorHandle(data, dst_type.scalar)
        return cast(self, src, dst_type)

    def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.dtype.scalar != tl.float32:
            return fma(self, x, y, z)
        with np.errstate(all="ignore"):
            product, z64 = x.data.astype(np.float64) * y.data, z.data.astype(np.float64)  # exact
            total = product + z64
            lost = (product - (total - (total - product))) + (z64 - (total - product))
            # rounded to odd: what float64 lost must not make a tie of float32, which would be rounded a second time
            even = (total.view(np.int64) & 1) == 0
            towards = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
            total = np.where(np.isfinite(total) & (lost != 0) & even, towards, total)
            return TensorHandle(total.astype(np.float32), tl.float32)

    InterpreterBuilder.cast_impl = rounded_cast
    InterpreterBuilder.create_fma = fused


if INTERPRETED:
    _round_as_a_gpu()


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(hash(request.node.name) % 2**31 if os.environ.get("KDFAST_FRESH_SEEDS") else 0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images: cifar-10-batches-py/, imagenette2-160/. Skips where there is none."""
    if "KDFAST_DATA" not in os.environ:
        pytest.skip("needs real images: set KDFAST_DATA to a folder with cifar-10-batches-py/ and imagenette2-160/")
    return Path(os.environ["KDFAST_DATA"])


@pytest.fixture(scope="session")
def oracles() -> Any:
    """Values and gradients of the original implementations in float64, by name; tests/make_oracles.py made them."""
    import numpy as np

    return np.load(Path(__file__).with_name("oracles.npz"))


@pytest.fixture(autouse=True)
def _own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pytest that a test starts is not an xdist worker: pytest-benchmark, for one, measures nothing in a worker."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test finds in image files is not kept in the user's ~/.cache. (XDG_CACHE_HOME would move matplotlib's fonts as well.)"""
    import kdfast.data  # noqa: F401  # with the module that a function of its name hides

    made: list[Path] = []  # once a test needs it

    def folder() -> Path:
        if not made:
            made.append(tmp_path_factory.mktemp("cache"))
        return made[0]

    monkeypatch.setattr(sys.modules["kdfast.data.checking"], "cache_folder", folder)

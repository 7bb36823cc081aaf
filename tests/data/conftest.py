"""Image files that the tests of kdfast.data share."""

from pathlib import Path

import pytest

from kdfast.data import Split
from tests.data.samples import plant_all, write_photographs


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """22 JPEG files of mixed sizes. Tests do not change them."""
    return write_photographs(tmp_path_factory.mktemp("photographs"), 22)


@pytest.fixture
def mixture(tmp_path: Path) -> list[str]:
    """Every kind of good and bad file."""
    return plant_all(tmp_path / "mixture")

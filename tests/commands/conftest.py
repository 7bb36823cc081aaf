"""One finished run that all tests of commands share, and a module with a user's own recipes."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.running import KD_SEEDS, kdfast

OWN_RECIPES = """from dataclasses import dataclass, replace

from kdfast.recipes import kd


@dataclass(frozen=True)
class Settings(kd.Settings):
    extra: float = 0.0
    \"\"\"More of it.\"\"\"


RECIPE = replace(kd.RECIPE, name="mine", settings=Settings)
KD = kd.RECIPE
"""


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: kd on 200 digits, two seeds. Tests do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert kdfast("distill", *KD_SEEDS, "--out", folder) == 0
    return folder


@pytest.fixture
def own_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """own_recipes.py in the current folder, which a console script does not have on its path."""
    (tmp_path / "own_recipes.py").write_text(OWN_RECIPES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield
    sys.modules.pop("own_recipes", None)

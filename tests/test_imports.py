import math
import sys

import pytest

from kdfast import imports


def test_require_returns_the_module():
    assert imports.require("math", extra="cli", what="Nothing") is math


@pytest.mark.parametrize("module", ["kdfast_absent", "kdfast_absent.inner", "json.absent"])
def test_require_says_how_to_install(module: str):
    with pytest.raises(ImportError) as caught:
        imports.require(module, extra="dali", what="The dali loader")
    assert str(caught.value) == f"The dali loader needs {module}: pip install 'kdfast[dali]'"


def test_check_installed_names_the_first_missing_module(monkeypatch: pytest.MonkeyPatch):
    imports.check_installed(("math", "json"), extra="cli", what="kdfast distill")
    monkeypatch.setitem(sys.modules, "json", None)
    with pytest.raises(ImportError, match=r"^kdfast distill needs json: pip install 'kdfast\[cli\]'$"):
        imports.check_installed(("math", "json", "kdfast_absent"), extra="cli", what="kdfast distill")


def test_import_object():
    assert imports.import_object("math:pi") == math.pi
    for name in ("kdfast_absent:x", "math:absent", "math", ":x"):
        with pytest.raises(ValueError):
            imports.import_object(name)

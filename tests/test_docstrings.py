"""Every public function and class of kdfast has an example in its docstring, and the example runs."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

MODULES = [f"kdfast{name}" for name in ["", ".functional", ".losses", ".optim", ".models", ".data", ".engine", ".recipes", ".reference"]]


def find_public_objects() -> dict[str, object]:
    """Functions and classes of kdfast that a public module's `__all__` names, by "module.name"."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for public in module.__all__:
            value = getattr(module, public)
            if callable(value) and getattr(value, "__module__", "").startswith("kdfast"):
                found[f"{name}.{public}"] = value
    return found


OBJECTS = find_public_objects()


def find_example(name: str) -> doctest.DocTest:
    """The doctest lines of an object's docstring; kdfast and torch are imported for them."""
    value = OBJECTS[name]
    scope = {"kdfast": importlib.import_module("kdfast"), "torch": torch}
    return doctest.DocTestParser().get_doctest(value.__doc__ or "", scope, name, None, None)


@pytest.mark.parametrize("name", sorted(OBJECTS))
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    example = find_example(name)
    assert example.examples, f"{name}'s docstring has no example"
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    printed: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failures, _ = doctest.DocTestRunner(optionflags=flags, verbose=False).run(example, out=printed.append)
    assert not failures, "".join(printed)
    assert not list(tmp_path.iterdir()), "the example leaves files"


@pytest.mark.parametrize("name", MODULES)
def test_a_public_module_lists_its_names(name: str):
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    assert module.__doc__

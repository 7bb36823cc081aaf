"""The notebooks run from start to end in a folder of their own, and are committed without what they print."""

import json
import os
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
FIGURES = {"losses_in_your_loop": 0, "conkd": 2, "new_recipe": 1}


def executed(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The notebook's outputs, run in `folder` by this environment's Python."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install kdfast[dev]")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install kdfast[dev]")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install kdfast[dev]")
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # not a kernel of the same name in the user's home
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(folder.parent / f"{folder.name}-{name.lower()}"))
    folder.mkdir()
    before = left()
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    assert left() == before, "the notebook wrote into the repository"
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def left() -> set[str]:
    return {*os.listdir(EXAMPLES), *(name for name in os.listdir(EXAMPLES.parent) if not name.startswith("."))}


def figures(outputs: list[dict]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_these_are_the_examples():
    assert {path.stem for path in NOTEBOOKS} == FIGURES.keys()
    readme = (EXAMPLES.parent / "README.md").read_text()
    assert all(f"(examples/{path.name})" in readme for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_that_a_run_leaves_is_stored(path: Path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}, "execution times, or an editor's settings"
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_on_the_digits(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("KDFAST_DATA", raising=False)
    assert figures(executed(path, tmp_path / "work", monkeypatch)) == FIGURES[path.stem]


@pytest.mark.slow
@pytest.mark.data
def test_conkd_runs_on_imagenette_where_it_is(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KDFAST_DATA", str(real_data))
    assert figures(executed(EXAMPLES / "conkd.ipynb", tmp_path / "work", monkeypatch)) == FIGURES["conkd"]
    (results,) = (tmp_path / "work" / "runs").glob("*/results.json")
    assert json.loads(results.read_text())["dataset"] == "imagenette"

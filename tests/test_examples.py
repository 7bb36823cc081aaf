"""The notebooks import what exists, run from start to end in a folder of their own, and are committed without outputs."""

import ast
import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = [pytest.param(path, id=path.stem) for path in sorted(EXAMPLES.glob("*.ipynb"))]
FIGURES = {"losses_in_your_loop": 0, "conkd": 2, "new_recipe": 1}


def run_notebook(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The outputs of the notebook, run in `folder` by this environment's Python."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install kdfast[dev]")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install kdfast[dev]")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install kdfast[dev]")
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # not a kernel of the same name in the user's home
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent), prepend=os.pathsep)
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(folder.parent / f"{folder.name}-{name.lower()}"))
    folder.mkdir()
    before = list_files()
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    assert list_files() == before, "the notebook wrote into the repository"
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def list_files() -> set[str]:
    """Names in examples/ and at the top of the repository."""
    return {*os.listdir(EXAMPLES), *(name for name in os.listdir(EXAMPLES.parent) if not name.startswith("."))}


def count_figures(outputs: list[dict[str, Any]]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_readme_lists_the_notebooks():
    readme = (EXAMPLES.parent / "README.md").read_text()
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == FIGURES.keys()
    assert all(f"(examples/{name}.ipynb)" in readme for name in FIGURES)


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_a_notebook_is_stored_without_traces_of_a_run(path: Path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}, "execution times, or an editor's settings"
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_a_notebook_imports_names_that_exist(path: Path):
    code = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code")
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom) and node.module.startswith("kdfast")]
    for node in imports:
        for name in node.names:
            module = importlib.import_module(node.module)
            assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS)
def test_a_notebook_runs_on_the_digits(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("KDFAST_DATA", raising=False)
    assert count_figures(run_notebook(path, tmp_path / "work", monkeypatch)) == FIGURES[path.stem]


@pytest.mark.slow
@pytest.mark.data
def test_conkd_runs_on_imagenette(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KDFAST_DATA", str(real_data))
    assert count_figures(run_notebook(EXAMPLES / "conkd.ipynb", tmp_path / "work", monkeypatch)) == FIGURES["conkd"]
    (results,) = (tmp_path / "work" / "runs").glob("*/results.json")
    assert json.loads(results.read_text())["dataset"] == "imagenette"

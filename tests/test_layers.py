"""The house stands: imports run one way, kernels know nothing of kdfast, and `import kdfast` is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# from the ground up; a file may import its own layer and those below it
LAYERS = [
    ["kdfast.kernels", "kdfast.reference", "kdfast.version", "kdfast.files", "kdfast.imports", "kdfast.machine", "kdfast.text"],
    ["kdfast.ops"],
    ["kdfast.functional", "kdfast.optim"],
    ["kdfast.losses", "kdfast.models", "kdfast.data"],
    ["kdfast.runs"],
    ["kdfast.engine", "kdfast.report"],
    ["kdfast.recipes", "kdfast.benchmarks"],
    ["kdfast.commands"],
    ["kdfast.cli"],
]
HEIGHT = {package: height for height, layer in enumerate(LAYERS) for package in layer}
# rooms of one layer that must not know each other
STRANGERS = [("kdfast.models", "kdfast.data"), ("kdfast.losses", "kdfast.models"), ("kdfast.losses", "kdfast.data")]


def module_name(path: Path) -> str:
    folder = {"kernels": "kdfast/kernels", "benchmarks": "kdfast/benchmarks"}
    parts = path.relative_to(ROOT).with_suffix("").parts
    dotted = ".".join([*folder.get(parts[0], parts[0]).split("/"), *parts[1:]])
    return dotted.removesuffix(".__init__")


def files() -> list[Path]:
    links = (ROOT / "kdfast" / "kernels", ROOT / "kdfast" / "benchmarks")
    found = [p for folder in ("kdfast", "kernels", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    return sorted(p for p in found if not any(p.is_relative_to(link) for link in links))


def imported(path: Path) -> set[str]:
    """All modules that the file imports, wherever in it, by full name; `if TYPE_CHECKING` blocks are for readers only."""
    found = set()
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(name: str) -> str | None:
    """The package of LAYERS that a module belongs to."""
    return next((package for package in HEIGHT if name == package or name.startswith(f"{package}.")), None)


@pytest.mark.parametrize("path", files(), ids=module_name)
def test_imports_run_one_way(path: Path):
    own = room(module_name(path))
    if own is None:
        assert module_name(path) == "kdfast", f"{path} belongs to no layer: add it to LAYERS"
        return
    for name in imported(path):
        other = room(name)
        if other is not None and other != own:
            assert HEIGHT[other] <= HEIGHT[own], f"{module_name(path)} imports {name}, which is above it"
            assert not {(own, other), (other, own)} & set(STRANGERS), f"{own} must not know {other}"


@pytest.mark.parametrize("path", [p for p in files() if p.is_relative_to(ROOT / "kernels")], ids=module_name)
def test_kernels_import_nothing_of_kdfast_but_each_other(path: Path):
    assert not [name for name in imported(path) if name.split(".")[0] == "kdfast" and room(name) != "kdfast.kernels"]


PUBLIC = {"kd_loss", "linear_kd_loss", "supcon_loss", "__init__ of Lion"}  # their arguments are the library's interface


def find_large_functions(path: Path) -> list[str]:
    """The functions above 80 lines or 12 parameters."""
    found = []
    for parent in ast.walk(ast.parse(path.read_text())):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{node.name} of {parent.name}" if isinstance(parent, ast.ClassDef) else node.name
                lines = (node.end_lineno or 0) - node.lineno + 1
                parameters = sum(isinstance(inner, ast.arg) for inner in ast.iter_child_nodes(node.args))
                if lines > 80 or (parameters > 12 and name not in PUBLIC):
                    found.append(f"{name}: {lines} lines, {parameters} parameters")
    return found


@pytest.mark.parametrize("path", [p for p in files() if not p.is_relative_to(ROOT / "kernels")], ids=module_name)
def test_functions_are_short(path: Path):
    assert not find_large_functions(path)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_import_kdfast_needs_neither_triton_nor_torchvision():
    blocked = "import sys\nfor name in ('triton', 'torchvision', 'nvidia.dali', 'sklearn', 'matplotlib'): sys.modules[name] = None\n"
    names = "kdfast.functional.kd_loss, kdfast.losses.KDLoss, kdfast.optim.Lion, kdfast.reference.kd_loss"
    assert run(f"{blocked}import kdfast; {names}; print('ok')") == "ok\n"


def test_import_kdfast_imports_little_beyond_torch():
    code = "import sys, torch; before = {*sys.modules}; import kdfast; print(*sorted({*sys.modules} - before))"
    imported = run(code).split()
    assert not [name for name in imported if name.split(".")[0] not in {"kdfast", *sys.stdlib_module_names}]
    assert len(imported) < 10

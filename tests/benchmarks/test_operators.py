"""Every operator is complete, and a place that was forgotten is named. CONTRIBUTING.md lists the places and has a skeleton of each."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdfast.optim
from kdfast import functional, reference
from kdfast.benchmarks.operators import OPERATORS, Operator

ROOT = Path(__file__).parents[2]
NO_KERNEL = {"hint_loss", "soft_cross_entropy"}  # functions of kdfast.functional in plain PyTorch
DOCUMENTS = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))


def find_missing_places(operator: Operator) -> list[str]:
    """The places of CONTRIBUTING.md's list that know nothing of the operator."""
    cpu, tests = torch.device("cpu"), ROOT / "tests" / "ops" / f"{operator.tests}.py"
    op = ROOT / "kdfast" / "ops" / operator.op.replace(".", "/")
    public = {*functional.__all__, *kdfast.optim.__all__}
    found = {
        f"kdfast/reference.py: {operator.reference} in __all__": operator.reference in reference.__all__,
        f"kernels/{operator.kernel}.py": (ROOT / "kernels" / f"{operator.kernel}.py").is_file(),
        f"kdfast/ops/{operator.op}": op.with_suffix(".py").is_file() or op.is_dir(),
        f"kdfast/functional.py: {operator.name} in __all__": operator.name in public,
        f"tests/ops/{operator.tests}.py with the marker kernels": tests.is_file() and "mark.kernels" in tests.read_text(),
        f"docs/: a page that mentions {operator.name}": operator.name in DOCUMENTS,
    }
    module = operator.module if importlib.util.find_spec(f"kdfast.benchmarks.{operator.benchmark}") else None
    arguments = {"cases": (cpu, torch.float32), "calls": (cpu, torch.float32)}
    if operator.benchmark == operator.kernel and importlib.util.find_spec("triton"):  # else it launches another operator's kernel
        arguments["launches"] = ("sm_90",)
    for name, given in arguments.items():
        yields = getattr(module, name, lambda *given: ())
        found[f"benchmarks/{operator.benchmark}.py: {name}"] = any(True for _ in yields(*given))
    return [place for place, is_there in found.items() if not is_there]


@pytest.mark.parametrize("name", OPERATORS)
def test_no_place_of_an_operator_is_missing(name):
    assert not find_missing_places(OPERATORS[name])


def test_every_kernel_and_every_function_is_registered():
    kernels = {path.stem for path in (ROOT / "kernels").glob("*.py") if "\n@triton.jit" in path.read_text()}
    assert kernels == {operator.kernel for operator in OPERATORS.values()}, "benchmarks/operators.py lists the operators"
    assert {*functional.__all__} - NO_KERNEL == OPERATORS.keys() - {"Lion"}, "benchmarks/operators.py lists the operators"


def test_each_missing_place_is_named():
    empty = Operator("no_loss", "no", "no", "no", "no_loss", "test_no")
    assert [place.partition(":")[0].partition(" ")[0] for place in find_missing_places(empty)] == [
        "kdfast/reference.py", "kernels/no.py", "kdfast/ops/no", "kdfast/functional.py", "tests/ops/test_no.py", "docs/",
        "benchmarks/no.py", "benchmarks/no.py", "benchmarks/no.py",
    ]  # fmt: skip


COMPILED = """
import torch
from kdfast.functional import gap_loss
x = torch.randn(3, 4, requires_grad=True)
torch.compile(gap_loss, fullgraph=True, backend="aot_eager")(x, torch.ones(3, 4)).backward()
assert x.grad.any()
"""


@pytest.mark.slow
def test_skeletons_of_the_guide_make_an_operator_and_a_recipe(tmp_path):
    pytest.importorskip("triton")
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__"))
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = [re.sub(r"^   ", "", block, flags=re.MULTILINE) for block in re.findall(r"```py\n(.*?)   ```", guide, re.DOTALL)]
    in_reference, kernel, op, in_functional, benchmark, line, test, recipe = blocks

    def edit(path: str, *changes: tuple[str, str], more: str = "") -> None:
        text = (clone / path).read_text()
        for old, new in changes:
            assert old in text, f"{path} has no {old!r}"
            text = text.replace(old, new, 1)
        (clone / path).write_text(text + more)

    named = ("__all__ = [\n", '__all__ = [\n    "gap_loss",\n')
    edit("kdfast/reference.py", named, more=f"\n\n{in_reference}")
    edit("kdfast/functional.py", named, ("from kdfast.ops import ", "from kdfast.ops import gap, "), more=f"\n\n{in_functional}")
    edit("benchmarks/operators.py", ('        Operator("kd_loss"', f'        {line}        Operator("kd_loss"'))
    edit("docs/losses.md", more="\ngap_loss compares rows.\n")
    for path, text in (("kernels", kernel), ("kdfast/ops", op), ("benchmarks", benchmark)):
        (clone / path / "gap.py").write_text(text)
    (clone / "tests/ops/test_gap.py").write_text(test)
    (clone / "kdfast/recipes/squares.py").write_text(recipe)

    def run(*command: str, **environment: str) -> None:
        done = subprocess.run([sys.executable, *command], cwd=clone, env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    pytest_quietly = ("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=0")
    run(*pytest_quietly, "tests/ops/test_gap.py", "tests/benchmarks/test_operators.py", "-m", "not slow")
    run(*pytest_quietly, "tests/benchmarks/test_codegen.py", "-m", "not slow", "-k", "gap_loss")
    run("-m", "mypy")
    run(*pytest_quietly, "tests/ops/test_gap.py", TRITON_INTERPRET="1")
    run("-c", COMPILED)
    small = ("--epochs", "1", "--max-images", "100", "--out", str(tmp_path / "run"), "--teacher-training.epochs", "1")
    run("-m", "kdfast.cli", "distill", "--recipe", "squares", "--dataset", "digits", "--device", "cpu", *small)

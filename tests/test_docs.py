"""Code in the documents runs and prints what they show; options, defaults, tables and figures in them are true."""

import ast
import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast import cli, models, recipes
from kdfast.benchmarks import report
from kdfast.benchmarks.maintain import documents
from kdfast.commands import bench, config, data, toml
from kdfast.engine import Training

ROOT = Path(__file__).parents[1]
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
OTHERS_OPTIONS = {"--nproc-per-node", "--benchmark-json", "--quick", "--long"}  # of torchrun and pytest
REPDISTILLERS_OPTIONS = {"--distill", "--path_t", "--kd-model-name", "--kd-loss-type"}  # of RepDistiller and timm, on migrating.md

# ---- code ------------------------------------------------------------------------------------------------------------


def find_code(page: str) -> list[tuple[str, str]]:
    """The page's Python blocks, each with the output shown right below it ("" where none is)."""
    return re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", PAGES[page], re.DOTALL)


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", [page for page in PAGES if find_code(page) and page != "docs/writing-recipes.md"])
@pytest.mark.usefixtures("process_group")
def test_the_code_of_a_page_runs(page: str):
    import kdfast

    logits, labels = torch.randn(8, 10, requires_grad=True), torch.arange(8)
    names = {
        "kdfast": kdfast,
        "torch": torch,
        **dict.fromkeys(["student_logits", "logit_s"], logits),
        **dict.fromkeys(["teacher_logits", "logit_t"], torch.randn(8, 10)),
        **dict.fromkeys(["labels", "target"], labels),
        "student_hidden": torch.randn(8, 4, requires_grad=True),
        "teacher_hidden": torch.randn(8, 6),
        "student_head": torch.nn.Linear(4, 10),
        "teacher_head": torch.nn.Linear(6, 10),
        "features": torch.nn.functional.normalize(torch.randn(8, 2, 16), dim=2).requires_grad_(),
        "model": torch.nn.Linear(2, 2),
    }
    for code, shown in find_code(page):
        scope, printed = dict(names), io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, scope)
        assert printed.getvalue() == shown
        assert "loss" not in scope or scope["loss"].isfinite()


def test_the_recipe_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ((code, _),) = find_code("docs/writing-recipes.md")
    (tmp_path / "my_features.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    command = "distill --recipe my_features:RECIPE --student resnet8 --teacher-model resnet14 --epochs 1 --max-images 100"
    command += f" --teacher-training.epochs 1 --seeds 1 --no-baseline --weight 0.5 --out {tmp_path / 'run'}"
    assert cli.main(command.split()) == 0
    assert "train/features" in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])


# ---- commands, options, links ----------------------------------------------------------------------------------------


def read_options(capsys: pytest.CaptureFixture[str], *command: str) -> set[str]:
    """The options that a command's help names."""
    with contextlib.suppress(SystemExit):
        cli.main([*command, "--help"])
    return set(re.findall(r"--[a-z][a-z0-9.-]*", capsys.readouterr().out))


def find_commands(text: str) -> list[tuple[str, set[str]]]:
    """Commands in code ("" where none is named, "bench loaders" for a subcommand), each with the options after it."""
    text = re.sub(r"^(```text|<!-- table).*?^(```|<!-- end)", "", text.replace("\\\n", " "), flags=re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"^    .*$", text, re.MULTILINE) + FENCED.findall(text)
    lines = [line.split("  #")[0] for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", FENCED.sub("", text))
    found = []
    for code in [*lines, *inline]:
        command = re.search(r"kdfast(?:\.cli)? ((?:(?:bench|data) )?[a-z]+)\b", code)
        options = re.findall(r"(?<![\w-])--[a-z][a-z0-9._-]*", code[command.end() :] if command else code)
        found.append((command[1] if command else "", set(options)))
    return [(command, options) for command, options in found if options or command]


def test_the_commands_and_options_in_the_documents_exist(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    known = {name: read_options(capsys, name) for name in cli.COMMANDS}
    known |= {f"bench {name}": read_options(capsys, "bench", name) for name in bench.BENCHES}
    known |= {f"data {name}": read_options(capsys, "data", name) for name in data.COMMANDS}
    known["distill"] = set().union(*(read_options(capsys, "distill", "--recipe", name) for name in recipes.names()))
    known["compare"] |= known["distill"]
    known[""] = set().union(*known.values()) | OTHERS_OPTIONS | REPDISTILLERS_OPTIONS
    found = [(page, *used) for page, text in PAGES.items() for used in find_commands(text)]
    assert {("distill", "--resume"), ("eval", "--model"), ("", "--max-bad-files")} <= {(name, o) for _, name, used in found for o in used}
    for page, command, used in found:
        if command.partition(" ")[0] in cli.COMMANDS or not command:
            options = known.get(command, known[command.partition(" ")[0]])
            assert used <= options, f"{page}: {command or 'no command'} has no {', '.join(used - options)}"
    for page, text in PAGES.items():
        for command in re.findall(r"^ +kdfast (\w+)", text, re.MULTILINE):
            assert command in cli.COMMANDS, f"{page}: there is no kdfast {command}"


def test_the_links_between_documents_lead_somewhere():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", FENCED.sub("", text)):
            assert ((ROOT / page).parent / target).exists(), f"{page}: there is no {target}"


# ---- recipes ---------------------------------------------------------------------------------------------------------


def find_line(pattern: str, page: str) -> str:
    """The only line of a page that matches."""
    lines = re.findall(pattern, PAGES[page], re.MULTILINE)
    assert len(lines) == 1, f"{page} has {len(lines)} lines like {pattern}, and must have one"
    return lines[0]


def test_every_recipe_has_a_page_and_is_on_the_lists():
    folder = {Path(page).stem for page in PAGES if page.startswith("docs/recipes/")}
    assert folder == set(recipes.names())
    for name in recipes.names():
        parts = ["**Use it when** ", "## Formula", f"{{recipe-options}} {name}\n", f"{{recipe-presets}} {name}\n", "## Published numbers"]
        assert not [part for part in parts if part not in PAGES[f"docs/recipes/{name}.md"]], name
        assert f"[{name}](recipes/{name}.md)" in PAGES["docs/recipes.md"]
        assert f"\nrecipes/{name}\n" in PAGES["docs/recipes.md"]
        row = find_line(rf"^\| \[{name}\].*", "README.md")
        for preset in recipes.get(name).presets:
            assert preset == "default" or preset.split("-")[0] in row, f"{name}'s preset {preset} is not in README"


@pytest.mark.parametrize("name", recipes.names())
def test_the_defaults_on_a_recipes_page_are_true(name: str):
    line = find_line("^Defaults: .*", f"docs/recipes/{name}.md")
    stated = {option: ast.literal_eval(value) for option, value in re.findall(r"`(\w+)=([^`]+)`", line)}
    real = {field.name: field.default for field in dataclasses.fields(recipes.get(name).settings)}
    assert stated
    assert stated == {option: real[option] for option in stated}


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_other_hosts(tmp_path: Path):
    for package in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install kdfast[docs]")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(tmp_path / "doctrees"), "docs", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        tags = re.findall(r"<(?:script|img|iframe|source|link)\b[^>]*>", page.read_text())
        assert not [tag for tag in tags if re.search(r"(src|href)=\"(https?:)?//", tag)], f"{page.name} loads from another host"


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_the_figures_in_the_documents_come_from_the_committed_results():
    for page in documents.PAGES:
        text = page.read_text()
        assert "\n|---" in text.partition("<!-- table")[2], f"{page.name} has no table"
        assert documents.fill_tables(text) == text, f"{page.name}: run kdfast bench report"
    shown = {name for text in PAGES.values() for name in re.findall(r"!\[[^]]*\]\((?:docs/)?figures/(.+?)\)", text)}
    assert shown == {path.name for path in documents.FIGURES.iterdir()}
    digests = {"cpu-gains": documents.identify(documents.read_gains("cpu"))}
    for device in documents.devices():
        results = documents.read_committed(device)
        digests |= {f"{device}-{name}": report.digest(results) for name in report.figures(results)}
    for name, digest in digests.items():
        drawn = (documents.FIGURES / f"{name}.svg").read_text()
        assert digest in drawn, f"{name}.svg is of other results: run kdfast bench report"


# ---- presets ---------------------------------------------------------------------------------------------------------


def test_every_preset_makes_a_configuration_with_known_networks():
    for name in recipes.names():
        recipe = recipes.get(name)
        for preset in recipe.presets:
            made = config.defaults(recipe, preset, None)
            assert {made.student, made.teacher_model} <= set(models.names())
            if preset not in ("default", "large-batch"):
                names = {field.name for field in dataclasses.fields(Training)} & recipe.presets[preset].values.keys()
                training = Training(**{key: recipe.presets[preset].values[key] for key in names})
                assert made.training == training, f"{name} {preset}: a data set's own defaults leak into a source's preset"
            table = toml.dump(made)
            assert toml.fill(made, tomllib.loads(table), "x") == made, f"{name} {preset} does not survive config.toml"


REPDISTILLER = Training(epochs=240, batch_size=64, lr=0.05, weight_decay=5e-4, milestones=(150, 180, 210))
DIH = Training(epochs=200, batch_size=64, lr=0.1, weight_decay=5e-4, nesterov=True, milestones=(60, 120, 180))
NOTEBOOK = Training(epochs=300, batch_size=128, optimizer="adamw", lr=6e-4, weight_decay=0.01, schedule="cosine", final_lr=1e-3)
PRESETS = [  # the whole training of a source, and some of its method's values
    ("kd", "repdistiller", REPDISTILLER, REPDISTILLER, {"temperature": 4.0, "kd_weight": 0.9, "ce_weight": 0.1}),
    ("at", "repdistiller", REPDISTILLER, REPDISTILLER, {"attention_weight": 1000.0, "kd_weight": 0.0, "ce_weight": 1.0}),
    ("dih", "dih-readme", DIH, DIH, {"temperature": 5.0, "alpha": (0.1,)}),
    ("conkd", "notebook", NOTEBOOK, replace(NOTEBOOK, epochs=60, batch_size=64), {"alpha": 0.15, "kd_weight": 1.0}),
]


@pytest.mark.parametrize(("name", "preset", "training", "teachers", "method"), PRESETS)
def test_a_preset_is_its_sources_training(name: str, preset: str, training: Training, teachers: Training, method: dict[str, Any]):
    made = config.defaults(recipes.get(name), preset, None)
    assert (made.training, made.teacher_training) == (training, teachers)
    assert {key: getattr(made.method, key) for key in method} == method


@pytest.mark.parametrize("name", recipes.names())
def test_large_batch_is_the_same_training_in_every_recipe(name: str):
    made = config.defaults(recipes.get(name), "large-batch", None)
    large = {"batch_size": 2048, "optimizer": "lion", "warmup": 5, "schedule": "cosine", "epochs": 30}  # epochs: the digits' own
    assert {key: getattr(made.training, key) for key in large} == large
    assert made.run.precision == "bf16"

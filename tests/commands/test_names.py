"""Names of files, classes and folders are printed as they are, on the terminal and in pages."""

import io
from pathlib import Path

import pytest
from PIL import Image

from kdfast.commands.tables import make_table
from kdfast.engine.terminal import Terminal
from kdfast.report import write_report
from tests.commands.running import fail, kdfast
from tests.report.making import make_run, rewrite

NAMES = [
    pytest.param("cat [bold]", "cat [bold]", id="markup"),
    pytest.param("pip install 'kdfast[cli]'", "pip install 'kdfast[cli]'", id="an extra"),
    pytest.param("[/red]", "[/red]", id="markup that closes nothing"),
    pytest.param(":smile: \\[b]", ":smile: \\[b]", id="emoji and an escape"),
    pytest.param("-dog", "-dog", id="leading dash"),
    pytest.param("esc\x1b[31m\x07", "esc\\x1b[31m\\x07", id="control characters"),
    pytest.param("one\ntwo\tthree\r", "one\\ntwo\\tthree\\r", id="lines and tabs"),
    pytest.param("gnp.\u202egpj", "gnp.\\u202egpj", id="direction of writing"),
    pytest.param("d\udcffg", "d\\xffg", id="bytes that are no UTF-8"),
    pytest.param("x" * 300, "x" * 300, id="long"),
    pytest.param("猫 é", "猫 é", id="letters"),
]


@pytest.mark.parametrize(("name", "shown"), NAMES)
def test_a_name_is_printed_as_it_is(name: str, shown: str):
    piped = io.StringIO()
    console = Terminal(file=piped)
    console.print(name)
    console.print(make_table((name, name), [(name, name)], left=2))
    assert [line for line in piped.getvalue().splitlines() if shown in line] == piped.getvalue().splitlines()[:1] + [
        line for line in piped.getvalue().splitlines()[1:] if line.count(shown) == 2
    ]
    assert piped.getvalue().count(shown) == 5


@pytest.mark.parametrize(("name", "shown"), NAMES)
def test_a_name_is_escaped_in_a_page(name: str, shown: str, tmp_path: Path):
    folder = tmp_path / "run"
    results = make_run(folder, classes=3, curves=False)
    text = rewrite(folder, results, classes=["<b>x</b>&amp;", name, "dog"])
    assert shown in text
    assert "<b>x</b>&amp;" in text
    assert "<b>x" not in write_report(folder).read_text(encoding="utf-8")


def test_predict_wraps_no_name_in_a_pipe(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    names = ["[bold]x[", "-lead", "new\nline", "d\udcffg", "y" * 200]
    for name in names:
        with (tmp_path / f"{name}.png").open("wb") as file:
            Image.new("RGB", (8, 8)).save(file, format="PNG")
    assert kdfast("predict", finished, tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    for shown in ("[bold]x[", "-lead", "new\\nline", "d\\xffg", "y" * 200):
        assert len([line for line in lines if f"{shown}.png" in line and line.count("%") == 3]) == 1


@pytest.mark.parametrize("option", ["--dataset", "--teacher", "--out"])
def test_a_name_that_config_toml_cannot_keep_is_refused(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert f"{option[2:]} must be UTF-8, got d\\xffg" in fail(capsys, "distill", option, "d\udcffg")
    assert not list(tmp_path.iterdir())

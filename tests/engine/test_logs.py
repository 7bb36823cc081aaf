"""TensorBoard and Weights & Biases get every number; the console prints progress."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kdfast.engine import Console
from kdfast.engine.logs import logs
from tests.engine.small import fit, linear, lines, stage

LINE = {"stage": "s", "epoch": 1, "epochs": 1, "best": True, "train/loss": 0.25, "val/top1": 0.5, "images_per_s": 1234.5}


def test_tensorboard_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple] = []

    def writer(folder: str) -> SimpleNamespace:
        calls.append((folder,))
        return SimpleNamespace(add_scalar=lambda *number: calls.append(number), flush=lambda: None, close=lambda: calls.append(("closed",)))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    (log,) = logs(["tensorboard"])
    with log(tmp_path) as observer:
        fit(tmp_path, stage("s", linear()), observers=[observer])
    assert (calls[0], calls[-1]) == ((str(tmp_path / "tensorboard"),), ("closed",))
    expected = [(f"s/{name}", line[name], line["epoch"]) for line in lines(tmp_path) for name in ("lr", "train/ce", "val/top1")]
    assert [call for call in calls if call[0].endswith(("/lr", "train/ce", "val/top1"))] == expected


def test_weights_and_biases_continues_a_run_and_tells_runs_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ids, ended = [], []

    def init(**keywords):
        ids.append(keywords["id"])
        return SimpleNamespace(log=lambda numbers: None, finish=lambda exit_code: ended.append(exit_code))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    (log,) = logs(["wandb"])
    for folder in ("a/kd", "a/kd", "b/kd"):  # the second is resumed
        with log(tmp_path / folder) as observer:
            observer(LINE)
    with pytest.raises(KeyboardInterrupt), log(tmp_path / "a/kd"):
        raise KeyboardInterrupt
    first, resumed, other, crashed = ids
    assert first == resumed == crashed != other
    assert ended == [0, 0, 0, 1]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_logger_is_one_sentence(monkeypatch: pytest.MonkeyPatch, name: str):
    for module in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"log {name} needs .*{name}: pip install 'kdfast\[{name}\]'"):
        logs([name])


def test_the_console_prints_one_line_for_a_finished_stage(capsys: pytest.CaptureFixture):
    with Console().stage("distil", epochs=1, images=80) as progress:
        progress.step(16)
        progress.epoch(LINE)
    start, end = capsys.readouterr().out.split(" s, ", 1)
    assert start.startswith("  distil: 1 epoch in ")
    assert end == "loss 0.250, val top-1 50.00 %, 1,234 images/s\n"


def test_the_console_needs_rich_unless_it_is_quiet(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    Console(quiet=True).say("nothing")
    with pytest.raises(ImportError, match=r"the progress display needs rich: pip install 'kdfast\[cli\]'"):
        Console().say("something")

"""Commands on a finished run: eval, predict, export, report."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from kdfast.data import NORMALIZATIONS, load
from kdfast.engine import Evaluation
from kdfast.models import ModelSpec, build, create, read_weights, save_weights
from kdfast.runs import artifact
from tests.commands.running import SHORT, evaluate, fail, kdfast, results_of

CLASSES = tuple(map(str, range(10)))
PREPARATION = artifact.Preparation(*NORMALIZATIONS["digits"], 8, "squash")  # as digits has it


def test_eval_repeats_the_runs_numbers(finished: Path, capsys: pytest.CaptureFixture[str]):
    numbers = evaluate(finished)
    chosen = max(results_of(finished)["arms"]["distilled"], key=lambda arm: arm["val/top1"])
    assert numbers["top1"] == chosen["best/top1"]
    assert numbers["images"] == 359
    assert "rows: true class" in capsys.readouterr().out


def test_eval_takes_given_options_over_the_runs(finished: Path):
    assert evaluate(finished, "--split", "val")["images"] == 359
    assert evaluate(finished, "--split", "train")["images"] == 200
    assert evaluate(finished, "--split", "train", "--max-images", 100, "--seed", 0, "--loader", "auto")["images"] == 100


def test_predict_names_classes_and_bad_files(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    test = load("digits").test
    for i in range(4):
        Image.fromarray(test.read(i).permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    assert kdfast("predict", finished, tmp_path, "--top", "2") == 0
    shown = capsys.readouterr().out
    assert all(f"{i}.png" in shown for i in range(4))
    assert len(re.findall(r"\d %", shown)) == 8
    (tmp_path / "1.png").write_bytes(b"")
    assert kdfast("predict", finished, tmp_path, tmp_path / "gone.png", "--batch-size", 1) == 1
    caught = capsys.readouterr()
    assert [name in caught.out for name in ("0.png", "1.png", "2.png", "3.png")] == [True, False, True, True], "the others are predicted"
    assert re.match(r"kdfast: 2 of 5 images cannot be read: \S+/1.png: [^;]+; \S+/gone.png: [^;]+\n$", caught.err)
    (tmp_path / "empty").mkdir()
    assert "no images in" in fail(capsys, "predict", finished, tmp_path / "empty")
    assert "images: name image files or folders after the run, got none" in fail(capsys, "predict", finished)


@pytest.mark.parametrize("kind", ["onnx", "pt2", "safetensors"])
def test_export_agrees_with_pytorch(finished: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / f"student.{kind}"
    assert kdfast("export", finished, "--format", kind, "--out", out) == 0
    assert float(re.search(r"agrees with PyTorch to (\S+)", capsys.readouterr().out)[1]) < 1e-5
    assert out.stat().st_size > 100_000


def read_facts(path: Path, kind: str) -> dict:
    """The header of an exported file."""
    if kind == "safetensors":
        return json.loads(read_weights(path)[1][artifact.METADATA])
    if kind == "pt2":
        extra = {artifact.METADATA: ""}
        torch.export.load(path, extra_files=extra)
        return json.loads(extra[artifact.METADATA])
    (found,) = pytest.importorskip("onnx").load(path).metadata_props
    return json.loads(found.value)


@pytest.mark.parametrize("kind", ["onnx", "pt2", "safetensors"])
@pytest.mark.parametrize(
    ("evaluation", "resizing"),
    [
        pytest.param("center-crop", "the shorter side to 18, then the middle 16 x 16", id="center-crop"),
        pytest.param("squash", "to 16 x 16", id="squash"),
    ],
)
def test_export_writes_how_images_are_prepared(tmp_path: Path, kind: str, evaluation: str, resizing: str):
    path, out, spec = tmp_path / "w.safetensors", tmp_path / f"out.{kind}", ModelSpec("resnet8", 10)
    artifact.save(path, build(spec).state_dict(), spec, CLASSES, replace(PREPARATION, evaluation=evaluation))
    assert kdfast("export", path, "--format", kind, "--out", out, "--image-size", 16) == 0
    facts = read_facts(out, kind)
    assert facts["classes"] == list(CLASSES)
    assert facts["preparation"] == {**vars(PREPARATION), "mean": [0.3053] * 3, "std": [0.376] * 3} | {
        "image_size": 16,
        "evaluation": evaluation,
        "resizing": resizing,
    }


def test_export_says_that_bare_weights_carry_no_normalization(tmp_path: Path, capsys):
    torch.save(create("resnet8", 10).state_dict(), tmp_path / "w.pth")
    options = ["--model", "resnet8", "--image-size", 16, "--format", "safetensors"]
    assert kdfast("export", tmp_path / "w.pth", *options) == 0
    assert f"note: {tmp_path / 'w.safetensors'} carries no normalization, no image size" in capsys.readouterr().out


@pytest.mark.parametrize("opset", [18, 20])
def test_export_writes_the_opset(finished: Path, tmp_path: Path, opset: int):
    onnx = pytest.importorskip("onnx")
    assert kdfast("export", finished, "--opset", opset, "--out", tmp_path / "out.onnx") == 0
    assert [known.version for known in onnx.load(tmp_path / "out.onnx").opset_import if known.domain == ""] == [opset]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--opset", 17], "opset must be at least 18, the lowest that PyTorch writes, got 17", id="opset too low"),
        pytest.param(["--opset", 99], "opset must be from 18 to .*, the newest of the installed onnx, got 99", id="opset too high"),
        pytest.param(["--opset", 18, "--format", "pt2"], "opset has no effect with format pt2", id="opset of another format"),
    ],
)
def test_export_refuses(finished: Path, tmp_path: Path, capsys, options: list[object], message: str):
    assert re.search(message, fail(capsys, "export", finished, "--out", tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_report_is_made_again_and_compares_runs(finished: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "report.html").unlink()
    assert kdfast("report", copy, finished, "--out", tmp_path / "both.html") == 0
    assert (copy / "report.html").read_text() == (finished / "report.html").read_text().replace("finished", "copy")
    assert (tmp_path / "both.html").exists()


def test_weights_of_another_architecture_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_weights(create("resnet14", 10), tmp_path / "w.safetensors", {})
    error = fail(capsys, "eval", tmp_path / "w.safetensors", "--model", "resnet8", "--dataset", "digits")
    assert re.search(r"w.safetensors does not fit ResNet: \d+ unexpected: layer1.1.bn1.bias", error)


@pytest.mark.parametrize(
    ("classes", "preparation", "told"),
    [
        pytest.param(CLASSES, PREPARATION, "", id="the same"),
        pytest.param(CLASSES, replace(PREPARATION, image_size=16), "with an image size of 16, and here it is 8", id="size"),
        pytest.param(
            CLASSES, replace(PREPARATION, evaluation="center-crop"), "with the resizing center-crop, and here it is squash", id="resizing"
        ),
        pytest.param(
            CLASSES,
            replace(PREPARATION, mean=(0.25,) * 3),
            "normalization by mean 0.25, 0.25, 0.25 and deviation 0.376, 0.376, 0.376, and here it is by mean 0.3053, 0.3053, 0.3053 and",
            id="normalization",
        ),
        pytest.param(
            ("1", "0", *CLASSES[2:]),
            PREPARATION,
            "the same classes in another order than digits's: class 0 is '1' there and '0' here",
            id="order",
        ),
        pytest.param(("zero", *CLASSES[1:]), PREPARATION, "other classes than digits's: class 0 is 'zero' there and '0' here", id="names"),
        pytest.param(CLASSES[:9], PREPARATION, "has 9 classes, but digits has 10", id="number"),
    ],
)
def test_how_a_teacher_was_trained_otherwise_is_told(tmp_path: Path, capsys, classes, preparation, told: str):
    path, spec = tmp_path / "w.safetensors", ModelSpec("resnet8", len(classes))
    artifact.save(path, build(spec).state_dict(), spec, classes, preparation)
    distill = ["distill", "--recipe", "kd", *SHORT, "--teacher", path, "--out", tmp_path / "run"]
    own = ["--image-size", 8, "--evaluation", "squash", "--normalization", "digits"]
    if classes == CLASSES:
        assert kdfast(*distill) == 0
        shown = capsys.readouterr().out
        assert (f"note: teacher {path} was trained " in shown, told in shown) == (bool(told), True)
        assert [told in note for note in results_of(tmp_path / "run")["notes"] if "was trained with" in note] == ([True] if told else [])
        assert kdfast("eval", path, "--dataset", "digits", *own) == 0
        assert (f"note: {path} was trained " in capsys.readouterr().out) == bool(told)
    else:
        assert told in fail(capsys, *distill)
        assert told in fail(capsys, "eval", path, "--dataset", "digits")


def test_a_torchvision_name_on_small_images_is_suspected(tmp_path: Path, capsys):
    torch.save(create("shufflenet_v2_x0_5", 10).state_dict(), tmp_path / "w.pth")
    assert kdfast("eval", tmp_path / "w.pth", "--model", "shufflenet_v2_x0_5", "--dataset", "digits", "--image-size", 32) == 0
    assert "made for images of 224 pixels, and here they have 32. A network for small images can have the same" in capsys.readouterr().out


def test_eval_refuses_images_that_are_too_small(tmp_path: Path, capsys):
    torch.save(create("vgg11_cifar", 10).state_dict(), tmp_path / "w.pth")
    error = fail(capsys, "eval", tmp_path / "w.pth", "--model", "vgg11_cifar", "--dataset", "digits")
    assert "w.pth takes no images of 8 x 8 pixels" in error


OUT = {"eval": "name it with --model", "export": "name it with --model", "predict": "needs weights that kdfast"}


@pytest.mark.parametrize("command", OUT)
def test_weights_of_an_unknown_architecture_are_refused(command: str, tmp_path: Path, capsys):
    save_weights(create("resnet8", 10), tmp_path / "w.safetensors", {})
    more = {"eval": ["--dataset", "digits"], "export": [], "predict": ["."]}[command]
    error = fail(capsys, command, tmp_path / "w.safetensors", *more)
    assert re.search(f"w.safetensors does not say which architecture it is of: .*{OUT[command]}", error)


def test_a_loss_that_is_not_a_number_is_no_success(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    result = Evaluation(0.1, 0.5, math.nan, [[1]], 359, 100.0)  # of a network that fails on some images
    monkeypatch.setattr("kdfast.commands.evaluate.evaluate", lambda *_: result)
    error = fail(capsys, "eval", finished, "--json", tmp_path / "e.json")
    assert "the loss on 359 images is nan: the network's outputs are not finite" in error
    assert not (tmp_path / "e.json").exists()


@pytest.mark.parametrize("command", ["eval", "export"])
def test_an_image_size_that_the_network_does_not_take_is_one_sentence(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_weights(create("vgg8_cifar", 10), tmp_path / "w.safetensors", {})
    more = ["--dataset", "digits"] if command == "eval" else ["--format", "safetensors", "--out", tmp_path / "o.safetensors"]
    error = fail(capsys, command, tmp_path / "w.safetensors", "--model", "vgg8_cifar", "--image-size", "4", *more)
    assert "w.safetensors takes no images of 4 x 4 pixels" in error

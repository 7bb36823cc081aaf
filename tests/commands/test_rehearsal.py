"""Networks that do not fit the images, the recipe or each other are refused before anything trains; networks of strangers are used."""

import re
import sys

import pytest

from tests.commands.running import SHORT, fail, kdfast, results_of

NETWORKS = """
from types import SimpleNamespace

import torch
from torch import nn

from kdfast.models import create


class Wrapped(nn.Module):
    def __init__(self, net, wrap):
        super().__init__()
        self.net, self.wrap = net, wrap

    def forward(self, images):
        return self.wrap(self.net(images), images.mean((2, 3)))


WRAPS = {
    "tuple": lambda logits, features: (features, logits),
    "list": lambda logits, features: [logits, {"features": features}],
    "dict": lambda logits, features: {"logits": logits, "aux_logits": logits},
    "other key": lambda logits, features: {"prediction": logits, "features": features},
    "object": lambda logits, features: SimpleNamespace(loss=None, logits=logits),
    "twice": lambda logits, features: (logits, logits),
    "none": lambda logits, features: None,
    "map": lambda logits, features: logits[:, :, None, None],
    "sum": lambda logits, features: logits.sum(1),
}


def make(num_classes, returns):
    return Wrapped(create("resnet8", num_classes), WRAPS[returns])


class Stages(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stages = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, stride=2), nn.Conv2d(12, 16, 3))
        self.head = nn.Linear(16, num_classes)

    def forward(self, images):
        return self.head(self.stages(images).mean((2, 3)))
"""


@pytest.fixture(autouse=True)
def networks(tmp_path, monkeypatch):
    (tmp_path / "strangers.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("strangers", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--student", "vgg11_cifar"], "student vgg11_cifar takes no images of 8 x 8 pixels: .*32x32", id="size"),
        pytest.param(["--student", "alexnet"], "student alexnet takes no images of 8 x 8 pixels", id="torchvision's size"),
        pytest.param(["--teacher-model", "vit_b_32"], "teacher vit_b_32 takes no images of 8 x 8 .*Expected 224", id="teacher's size"),
        pytest.param(["--recipe", "takd", "--assistants", "vgg11_cifar"], "vgg11_cifar: images must", id="assistant"),
        pytest.param(["--recipe", "takd", "--assistants", "resnt20"], "no network 'resnt20'", id="no assistant"),
        pytest.param(["--recipe", "at", "--student", "vgg8_cifar"], "equally many stages, got 4 .* and 3", id="numbers of stages"),
        pytest.param(["--recipe", "dih", "--teacher-model", "mobilenet_v2"], "teacher_stages must be named", id="no stages"),
        pytest.param(["--recipe", "at", "--student-stages", "layer9"], "no module 'layer9'", id="stage"),
        pytest.param(["--recipe", "fitnets", "--teacher-hint", "linear"], r"or \[B, H, W, C\], got \[B, 10\]", id="hint"),
        pytest.param(["--recipe", "mhkd", "--head-padding", "0"], "maps of at least 5 x 5 pixels", id="heads' padding"),
        pytest.param(["--recipe", "crd", "--student", "torchvision.models:squeezenet1_1", "--image-size", "64"], "no linear", id="head"),
        pytest.param(["--student-options", "widht=2"], "does not take .*'widht'; its options: shortcut, in_channels", id="option"),
        pytest.param(["--student", "googlenet"], "torchvision.models:googlenet builds it", id="auxiliary classifiers"),
        *(
            pytest.param(["--student", "strangers:make", "--student-options", f"returns={returns}"], message, id=f"returns {returns}")
            for returns, message in (
                ("twice", r"must return logits \[B, 10\], alone or called logits, got tuple of \[2, 10\], \[2, 10\]"),
                ("none", "got NoneType of nothing"),
                ("map", r"must give one logit a class, .* shape \(2, 10, 1, 1\)"),
                ("sum", r"must give one logit a class, .* shape \(2,\)"),
            )
        ),
        pytest.param(["--teacher-model", "strangers:make", "--teacher-options", "returns=twice"], "teacher .* must return", id="teacher"),
    ],
)
def test_networks_that_do_not_fit_are_refused_before_training(tmp_path, capsys, options, message):
    arguments = ["distill", "--recipe", "kd", *SHORT, "--out", tmp_path / "run", *options]
    assert re.search(message, fail(capsys, *arguments))
    assert not (tmp_path / "run" / "config.toml").exists()


def test_teacher_refuses_images_before_training(tmp_path, capsys):
    error = fail(capsys, "teacher", "--model", "vgg16", "--image-size", "16", "--out", tmp_path / "run")
    assert "vgg16 takes no images of 16 x 16 pixels" in error


_SLOW = ("list", "dict", "other key")


@pytest.mark.parametrize(
    "returns",
    [pytest.param(name, marks=pytest.mark.slow if name in _SLOW else ()) for name in ("tuple", "object", *_SLOW)],
)
def test_a_network_is_used_by_its_logits(tmp_path, returns, capsys):
    mine = ["--student", "strangers:make", "--student-options", f"returns={returns}"]
    mine += ["--teacher-model", "strangers:make", "--teacher-options", f"returns={returns}"]
    assert kdfast("distill", "--recipe", "kd", *SHORT, *mine, "--out", tmp_path / "run") == 0
    assert kdfast("distill", "--recipe", "kd", *SHORT, "--out", tmp_path / "plain") == 0
    found, plain = results_of(tmp_path / "run"), results_of(tmp_path / "plain")
    assert found["confusion"] == plain["confusion"], "wrapping the same network changes nothing"
    assert kdfast("eval", tmp_path / "run", "--model", "strangers:make") == 0
    assert kdfast("export", tmp_path / "run", "--model", "strangers:make", "--format", "pt2", "--out", tmp_path / "a.pt2") == 0


def test_stages_that_are_modules_are_found(tmp_path):
    options = ["--student", "strangers:Stages", "--teacher-model", "strangers:Stages", "--image-size", "16"]
    assert kdfast("distill", "--recipe", "at", *SHORT, *options, "--out", tmp_path / "run") == 0


def test_images_too_small_for_training_alone_are_refused_before_it(tmp_path, capsys):
    options = ["--student", "torchvision.models:inception_v3", "--student-options", "init_weights=false", "--image-size", 96]
    error = fail(capsys, "distill", "--recipe", "kd", *SHORT, *options, "--out", tmp_path / "run")
    assert "student torchvision.models:inception_v3 takes no images of 96 x 96 pixels: " in error

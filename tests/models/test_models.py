"""Networks by name: the parameter counts of the papers, shapes, stages, option A, the user's own, and specs."""

import sys

import pytest
import torch
from torch import nn

from kdfast.models import ModelSpec, Taps, build, create, feature_size, names, parameter_count, recognize, tap_shapes
from kdfast.models.zoo import NETWORKS, outline

# network: parameters with 10 and with 100 classes
COUNTS = {
    "resnet8": (78_042, 83_892),
    "resnet14": (175_258, 181_108),
    "resnet20": (272_474, 278_324),
    "resnet32": (466_906, 472_756),
    "resnet56": (855_770, 861_620),
    "resnet110": (1_730_714, 1_736_564),
    "wrn_28_2": (1_467_610, 1_479_220),
    "wrn_16_2": (691_674, 703_284),
    "wrn_40_2": (2_243_546, 2_255_156),
    "wrn_40_1": (563_930, 569_780),
    "vgg11_cifar": (9_231_114, 9_277_284),
    "vgg8_cifar": (3_918_858, 3_965_028),
    "vgg13_cifar": (9_416_010, 9_462_180),
    "resnet18_cifar": (11_173_962, 11_220_132),
    "resnet34_cifar": (21_282_122, 21_328_292),
    "resnet50_cifar": (23_520_842, 23_705_252),
    "resnet8x4": (1_210_410, 1_233_540),
    "resnet32x4": (7_410_730, 7_433_860),
    "mobilenetv2_cifar": (697_546, 812_836),
    "resnet18": (11_181_642, 11_227_812),
}

# the stages' shapes for an image of 32 pixels
STAGES = {
    "resnet8": [(16, 32, 32), (32, 16, 16), (64, 8, 8)],
    "resnet8x4": [(64, 32, 32), (128, 16, 16), (256, 8, 8)],
    "resnet18_cifar": [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)],
    "resnet50_cifar": [(256, 32, 32), (512, 16, 16), (1024, 8, 8), (2048, 4, 4)],
    "wrn_16_2": [(32, 32, 32), (64, 16, 16), (128, 8, 8)],
    "vgg8_cifar": [(128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4)],
    "vgg11_cifar": [(64, 16, 16), (128, 16, 16), (256, 8, 8), (512, 1, 1)],
    "resnet18": [(64, 8, 8), (128, 4, 4), (256, 2, 2), (512, 1, 1)],
    "mobilenetv2_cifar": [(12, 16, 16), (16, 8, 8), (48, 4, 4), (160, 2, 2)],
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_papers(name):
    with torch.device("meta"):
        assert tuple(parameter_count(create(name, classes)) for classes in (10, 100)) == COUNTS[name]


@pytest.mark.parametrize("name", STAGES)
def test_stages_at_32_pixels(name):
    with torch.device("meta"):
        model = create(name, 7)
        assert list(tap_shapes(model, model.stages, (3, 32, 32))) == STAGES[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_stages_and_a_head(name):
    with torch.device("meta"):
        model = create(name, 10, in_channels=1)
        assert isinstance(model.stages, tuple)
        Taps(model, model.stages)
        assert model(torch.empty(2, 1, 64, 64).to(memory_format=torch.channels_last)).shape == (2, 10)
        headless = create(name, 10, head="none")
        assert headless(torch.empty(2, 3, 32, 32)).shape == (2, feature_size(headless))
        if name != "vgg11_cifar":
            assert model(torch.empty(2, 1, 8, 8)).shape == (2, 10)


def test_vgg11_requires_32_pixels():
    with pytest.raises(ValueError, match="at least 32x32"):
        create("vgg11_cifar", 10)(torch.randn(2, 3, 16, 16))


def test_option_a_takes_every_other_pixel_between_channels_of_zeros():
    model, x = create("resnet8", 10, shortcut="A"), torch.randn(2, 16, 5, 6)
    y = torch.cat([torch.zeros(2, 8, 3, 3), x[:, :, ::2, ::2], torch.zeros(2, 8, 3, 3)], dim=1)
    assert torch.equal(model.layer2[0].shortcut(x), y)
    assert not any(".shortcut." in key for key in model.state_dict())


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_2", "vgg8_cifar", "mobilenetv2_cifar"])
def test_initialization_is_he_and_seeded(name):
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(create(name, 10))
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))
    convolution = max((m for m in models[0].modules() if isinstance(m, nn.Conv2d)), key=lambda m: m.weight.numel())
    fan_out = convolution.out_channels * convolution.kernel_size[0] ** 2
    assert convolution.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


class TestSpec:
    def test_survives_json(self):
        spec = ModelSpec("resnet8", 10, "mlp", {"shortcut": "A", "in_channels": 1})
        again = ModelSpec.from_json(spec.to_json())
        assert again == spec
        assert hash(again) == hash(spec)
        assert build(again)(torch.randn(2, 1, 8, 8)).shape == (2, 10)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "resnet8", "num_classes": 10, "colour": 1}', '{"name": "resnet8"}'])
    def test_refuses_other_text(self, text):
        with pytest.raises(ValueError, match=r"from_json: expected name"):
            ModelSpec.from_json(text)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            pytest.param(("resnet8", 0), ValueError, "positive integer", id="no class"),
            pytest.param(("resnet8", 2.5), ValueError, "positive integer", id="half a class"),
            pytest.param(("resnet8", 3, "fc"), ValueError, "linear, mlp, none", id="head"),
        ],
    )
    def test_names_a_bad_field(self, arguments, error, message):
        with pytest.raises(error, match=message):
            ModelSpec(*arguments)


_FAMILIES = ("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "maxvit_t", "mnasnet0_5", "mobilenet_v3_small", "regnet_x_400mf")
_FAMILIES += ("resnet18", "shufflenet_v2_x0_5", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32", *NETWORKS)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in _FAMILIES else pytest.mark.slow) for name in names()])
def test_every_listed_network_is_outlined_and_takes_images(name):
    random, spec = torch.get_rng_state(), ModelSpec(name, 7)
    model = outline(spec)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert [model.train(mode)(torch.empty(2, 3, 224, 224, device="meta")).shape for mode in (True, False)] == [(2, 7), (2, 7)]
    assert recognize(model.state_dict(), name)[0] == spec
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 299)])
def test_logits_are_taken_from_auxiliary_classifiers(name, size):
    model = create(f"torchvision.models:{name}", 7, init_weights=False, transform_input=False)
    images = torch.randn(2, 3, size, size)
    logits = model(images)
    assert logits.shape == (2, 7)
    assert isinstance(model.forward(images), tuple), "the network itself returns its auxiliary logits too"


def test_names_lists_ours_and_torchvisions():
    listed = names()
    assert {"resnet20", "wrn_28_2", "vgg11_cifar", "resnet18", "resnet101", "wide_resnet50_2", "vgg16_bn"} <= set(listed)
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        pytest.param("resnt20", {}, r"no network 'resnt20'; the nearest names are resnet20", id="name"),
        pytest.param(
            "resnet8", {"widht": 2}, "'resnet8' does not take these options: .*'widht'; its options: shortcut, in_channels", id="option"
        ),
        pytest.param("resnet18", {"in_channels": 1}, "'resnet18' does not take these options", id="torchvision option"),
        pytest.param("resnet20", {"pretrained": True}, r"no pretrained weights for 'resnet20'.*load_weights", id="pretrained"),
    ],
)
def test_create_names_a_mistake(name, options, message):
    with pytest.raises(ValueError, match=message):
        create(name, 10, **options)


@pytest.fixture
def own_networks(tmp_path, monkeypatch):
    """my_networks.py in the current folder, which a console script does not have on its path."""
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n"
        "def mine(num_classes, width=4):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.Linear(width, num_classes))\n"
        "def number(num_classes):\n    return 3\n"
        "constant = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield
    sys.modules.pop("my_networks", None)


@pytest.mark.usefixtures("own_networks")
def test_a_users_function_is_called_with_classes_and_options():
    model = create("my_networks:mine", 5, width=6)
    assert (model[1].out_features, model[2].out_features) == (6, 5)
    assert build(ModelSpec("my_networks:mine", 5, "none", {"width": 6}))(torch.randn(2, 3, 2, 2)).shape == (2, 6)


class TestTorchvision:
    def test_pretrained_gets_a_new_classifier(self, monkeypatch):
        import torchvision

        original = torchvision.models.resnet18()
        monkeypatch.setattr(torchvision.models.ResNet18_Weights.DEFAULT.__class__, "get_state_dict", lambda *_, **__: original.state_dict())
        model = create("resnet18", 10, pretrained=True)
        assert model.fc.out_features == 10
        assert torch.equal(model.layer4[1].conv2.weight, original.layer4[1].conv2.weight)
        assert torch.equal(create("resnet18", 1000, pretrained=True).fc.weight, original.fc.weight)

    def test_pretrained_without_network_says_what_to_do(self, monkeypatch):
        from urllib.error import URLError

        def fail(*_, **__):
            raise URLError("no route")

        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
        with pytest.raises(OSError, match=r"'resnet18' could not be fetched.*put https://.*pth into .*load_weights"):
            create("resnet18", 10, pretrained=True)

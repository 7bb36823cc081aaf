"""Heads: found, measured, replaced."""

import collections
import copy
import types

import pytest
import torch
from torch import nn

from kdfast.models import create, feature_size, find_head, projection_head, replace_head
from kdfast.models.heads import FindLogits

CLASSIFIERS = {
    "resnet20": ("linear", 64),
    "wrn_40_2": ("fc", 128),
    "vgg11_cifar": ("classifier", 512),
    "mobilenetv2_cifar": ("classifier.0", 1280),
    "resnet50": ("fc", 2048),
    "mobilenet_v2": ("classifier.1", 1280),
    "vgg16_bn": ("classifier.6", 4096),
    "vit_b_16": ("heads.head", 768),
    "densenet121": ("classifier", 1024),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_find_head_finds_the_classifier(name):
    with torch.device("meta"):
        model = create(name, 7)
    path, layer = find_head(model)
    assert (path, layer.in_features, layer.out_features) == (*CLASSIFIERS[name], 7)
    assert layer is model.get_submodule(path)
    assert feature_size(model) == layer.in_features


def test_usual_names_come_before_later_layers():
    model = nn.Module()
    model.fc, model.auxiliary = nn.Linear(3, 2), nn.Linear(5, 4)
    assert find_head(model) == ("fc", model.fc)
    del model.fc
    assert find_head(model) == ("auxiliary", model.auxiliary)


@pytest.mark.parametrize("model", [nn.Conv2d(3, 4, 1), nn.Linear(3, 4)], ids=["no linear", "nothing around it"])
def test_a_model_without_head_is_an_error(model):
    with pytest.raises(ValueError, match="has no linear layer"):
        find_head(model)


def test_a_replaced_head_is_found_again():
    model = create("resnet8", 10, head="none")
    assert feature_size(model) == 64
    with pytest.raises(ValueError, match=r"no linear classifier: its head 'linear' is a Identity"):
        find_head(model)
    replace_head(model, nn.Linear(64, 5))
    assert find_head(model) == ("linear", model.linear)
    twin = copy.deepcopy(replace_head(model, nn.Identity()))
    assert replace_head(twin, nn.Linear(64, 3))(torch.randn(2, 3, 8, 8)).shape == (2, 3)
    assert isinstance(model.linear, nn.Identity)


def test_an_mlp_counts_as_one_head():
    model = create("resnet8", 10, head="mlp")
    assert [type(layer).__name__ for layer in model.linear] == ["Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear"]
    assert model.linear[3].p == 0.4
    assert find_head(model) == ("linear.4", model.linear[4])
    assert feature_size(model) == 64
    assert replace_head(model, nn.Linear(64, 5))(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_projection_head_has_two_layers_and_unit_rows():
    head, x = projection_head(6, 5), torch.randn(3, 6)
    first, _, second = head.layers
    assert (first.out_features, second.out_features) == (6, 5)
    assert projection_head(6, hidden=9).layers[0].out_features == 9
    z = second(first(x).clamp_min(0))
    torch.testing.assert_close(head(x), z / z.norm(dim=1, keepdim=True))


LOGITS, FEATURES = torch.zeros(2, 5), torch.zeros(2, 7)
Named = collections.namedtuple("Named", ["logits", "aux_logits"])


@pytest.mark.parametrize(
    "returned",
    [
        pytest.param(LOGITS, id="tensor"),
        pytest.param((FEATURES, LOGITS), id="tuple"),
        pytest.param([LOGITS, {"features": FEATURES}], id="list"),
        pytest.param((LOGITS,), id="tuple of one"),
        pytest.param({"logits": LOGITS, "other": LOGITS + 1}, id="dictionary"),
        pytest.param({"prediction": LOGITS, "features": FEATURES, "maps": torch.zeros(2, 5, 4, 4)}, id="dictionary with another key"),
        pytest.param(collections.OrderedDict(loss=None, logits=LOGITS), id="mapping of a class of its own"),
        pytest.param(types.SimpleNamespace(loss=None, logits=LOGITS, hidden_states=(FEATURES,)), id="object"),
        pytest.param(Named(LOGITS, LOGITS + 1), id="named tuple"),
    ],
)
def test_logits_are_found(returned):
    assert FindLogits(5)(nn.Identity(), (), returned) is LOGITS


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        pytest.param((LOGITS, LOGITS + 1), r"tuple of \[2, 5\], \[2, 5\]", id="two"),
        pytest.param((FEATURES, torch.zeros(2)), r"tuple of \[2, 7\], \[2\]", id="none that fits"),
        pytest.param({"logits": FEATURES}, r"dict of \[2, 7\]", id="logits of other classes"),
        pytest.param({}, "dict of nothing", id="empty dictionary"),
        pytest.param(None, "NoneType of nothing", id="None"),
        pytest.param([1, "a"], "list of int, str", id="no tensors"),
    ],
)
def test_what_holds_no_logits_is_refused(returned, got):
    with pytest.raises(ValueError, match=rf"Identity must return logits \[B, 5\], alone or called logits, got {got}$"):
        FindLogits(5)(nn.Identity(), (), returned)

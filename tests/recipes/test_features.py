"""Feature maps of any layout: [B, C, H, W] and [B, H, W, C] are told apart, tokens are refused."""

import pytest
import torch
from torch import nn

from kdfast.recipes.features import FeatureMaps, stage_paths
from kdfast.recipes.tofd import StageClassifiers


class Layout(nn.Module):
    """Passes feature maps on in another layout."""

    def __init__(self, last):
        super().__init__()
        self.last = last

    def forward(self, x):
        return x.permute(0, 2, 3, 1) if self.last else x


class Network(nn.Module):
    """Two stages of 8 and 6 channels; `last` puts their channels last, as Swin does; `size` refuses images of another size."""

    def __init__(self, last, size=None):
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 8, 1), Layout(last)), nn.Sequential(nn.Conv2d(8, 6, 2, 2), Layout(last))])
        self.head, self.last, self.size = nn.Linear(6, 5), last, size

    def forward(self, images):
        assert self.size in (None, images.shape[-1])
        for stage in self.stages:
            images = stage(images)
            images = images.permute(0, 3, 1, 2) if self.last else images
        return self.head(images.mean((2, 3)))


@pytest.mark.parametrize("size", [pytest.param(10, id="told by their shapes"), pytest.param(8, id="8 channels of 8 x 8")])
def test_channels_last_is_told_from_channels_first(size):
    images = torch.randn(2, 3, size, size)
    first, last = (FeatureMaps(Network(last), (), "stages", size) for last in (False, True))
    assert first.shapes == last.shapes == ((8, size, size), (6, size // 2, size // 2))
    assert first.channels_last == (False, False)
    assert last.channels_last == (True, True)
    for one, other in zip(first(images)[1], last(images)[1]):
        assert torch.equal(one, other)


def test_classifiers_of_tofd_take_channels_last():
    images = torch.randn(2, 3, 8, 8)
    torch.manual_seed(1)
    first, last = (StageClassifiers(Network(last), (), "stages", 8, 5).eval() for last in (False, True))
    last.heads.load_state_dict(first.heads.state_dict())
    for one, other in zip(first.predict(images), last.predict(images)):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize(
    ("network", "named", "message"),
    [
        pytest.param(
            Network(False, 8), (), r"stages: stages.0 puts out \[B, 8, 8, 8\], and it is not clear which are channels", id="unclear"
        ),
        pytest.param(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2)), ("1",), r"got \[B, 4, 64\], tokens", id="tokens"),
        pytest.param(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), ("1",), r"stages: 1 must put out .*, got \[B, 4\]$", id="features"),
        pytest.param(nn.LSTM(8, 4), ("",), "stages: ", id="a tuple"),
    ],
)
def test_what_is_no_feature_map_is_refused(network, named, message):
    with pytest.raises(ValueError, match=message):
        FeatureMaps(network, named, "stages", 8)


@pytest.mark.parametrize(
    ("stages", "paths"),
    [
        pytest.param(("a", "b"), ("a", "b"), id="paths"),
        pytest.param(nn.Sequential(nn.ReLU(), nn.ReLU()), ("stages.0", "stages.1"), id="modules, as timm's"),
        pytest.param([2, 2], None, id="numbers"),
        pytest.param((), None, id="none"),
    ],
)
def test_stages_of_other_libraries(stages, paths):
    network = nn.Module()
    network.stages = stages
    if paths is None:
        with pytest.raises(ValueError, match=r"student_stages must be named"):
            stage_paths(network, "student_stages")
    else:
        assert stage_paths(network, "student_stages") == paths

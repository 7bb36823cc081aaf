"""Transforms by name: sizes, normalization, and each augmentation doing what its name says."""

import pytest
import torch
from torchvision.transforms import v2

from kdfast.data import NORMALIZATIONS, Normalize, evaluation_names, evaluation_transform, training_names, training_transform

MEAN, STD = NORMALIZATIONS["imagenet"]


def image(height, width):
    """Every pixel of the first channel has its own value, so that a crop tells where it was; zero does not occur."""
    values = (torch.arange(height * width) % 255 + 1).to(torch.uint8).view(height, width)
    return torch.stack([values, values.flip(0), values.flip(1)])


def train(name, size):
    return training_transform(name, size, MEAN, STD)


@pytest.mark.parametrize("name", training_names())
@pytest.mark.parametrize("shape", [(40, 50), (32, 32)], ids=str)
def test_training_gives_normalized_squares(name, shape):
    transform = train(name, 32)
    assert transform.augment(image(*shape)).dtype == torch.uint8
    out = transform(image(*shape))
    assert out.shape == (3, 32, 32)
    assert out.dtype == torch.float32


NAMED = [*((training_transform, name) for name in training_names()), *((evaluation_transform, name) for name in evaluation_names())]


@pytest.mark.parametrize(("make", "name"), NAMED, ids=[f"{make.__name__} {name}" for make, name in NAMED])
def test_the_seed_decides_the_augmentation_and_random_says_whether_it_matters(make, name):
    transform, state = make(name, 32, MEAN, STD), torch.get_rng_state()
    transform.augment(image(32, 32))
    assert transform.random != torch.equal(state, torch.get_rng_state())

    def draw(seed):
        torch.manual_seed(seed)
        return transform.augment(image(32, 32))

    assert torch.equal(draw(5), draw(5))
    assert transform.random == any(not torch.equal(draw(5), draw(seed)) for seed in range(6, 10))


def test_normalization_is_torchvisions():
    pixels = torch.randint(256, (2, 3, 9, 7), dtype=torch.uint8)
    for mean, std in NORMALIZATIONS.values():
        ours = Normalize(mean, std)(pixels)
        theirs = v2.functional.normalize(pixels.double() / 255, list(mean), list(std))
        assert (ours - theirs).abs().max() < 2e-6


def test_none_and_squash_resize_only_where_needed():
    small, large = image(8, 8), image(20, 12)
    for transform in (train("none", 8), evaluation_transform("squash", 8, MEAN, STD)):
        assert torch.equal(transform.augment(small), small)
        assert torch.equal(transform.augment(large), v2.functional.resize(large, [8, 8], antialias=True))


def test_center_crop_is_the_usual_one():
    source = image(300, 400)
    expected = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])(source)
    assert torch.equal(evaluation_transform("center-crop", 224, MEAN, STD).augment(source), expected)

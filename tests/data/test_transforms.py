"""Transforms by name: sizes, normalization, and each augmentation doing what its name says."""

import pytest
import torch
from torchvision.transforms import v2

from kdfast.data import NORMALIZATIONS, DataError, Normalize, evaluation_names, evaluation_transform, training_names, training_transform

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


@pytest.mark.parametrize("name", training_names())
def test_random_says_whether_the_augmentation_draws_numbers(name):
    transform, state = train(name, 32), torch.get_rng_state()
    transform.augment(image(32, 32))
    assert transform.random != torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", training_names())
def test_one_seed_gives_one_augmentation(name):
    transform = train(name, 32)

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


@pytest.mark.parametrize(("name", "mode"), [("cifar", "constant"), ("cifar-reflect", "reflect")])
def test_shift_and_flip_are_a_crop_of_the_padded_image(name, mode):
    transform, source = train(name, 16), image(16, 16)
    padded = torch.nn.functional.pad(source.float(), (4, 4, 4, 4), mode=mode).to(torch.uint8)
    windows = {(top, left): padded[:, top : top + 16, left : left + 16] for top in range(9) for left in range(9)}
    seen, flipped = set(), 0
    for _ in range(400):
        out = transform.augment(source)
        place = {p: w for p, w in windows.items() if torch.equal(out, w)}
        mirrored = {p: w for p, w in windows.items() if torch.equal(out.flip(-1), w)}
        assert place or mirrored
        flipped += not place
        seen |= set(place or mirrored)
    assert {top for top, _ in seen} == {left for _, left in seen} == set(range(9))
    assert 140 < flipped < 260


def test_digits_shift_by_an_eighth_and_do_not_flip():
    transform, source = train("digits", 8), image(8, 8)
    padded = torch.nn.functional.pad(source, (1, 1, 1, 1))
    windows = [padded[:, top : top + 8, left : left + 8] for top in range(3) for left in range(3)]
    for _ in range(50):
        out = transform.augment(source)
        assert any(torch.equal(out, window) for window in windows)


def test_none_and_squash_resize_only_where_needed():
    small, large = image(8, 8), image(20, 12)
    for transform in (train("none", 8), evaluation_transform("squash", 8, MEAN, STD)):
        assert torch.equal(transform.augment(small), small)
        assert torch.equal(transform.augment(large), v2.functional.resize(large, [8, 8], antialias=True))


def test_center_crop_is_the_usual_one():
    source = image(300, 400)
    expected = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])(source)
    assert torch.equal(evaluation_transform("center-crop", 224, MEAN, STD).augment(source), expected)


def test_imagenet_is_torchvisions_random_resized_crop():
    source, transform = image(100, 80), train("imagenet", 32)
    torch.manual_seed(1)
    ours = transform.augment(source)
    torch.manual_seed(1)
    theirs = v2.RandomResizedCrop(32, antialias=True)(source)
    assert torch.equal(ours, theirs) or torch.equal(ours, theirs.flip(-1))


@pytest.mark.parametrize("name", evaluation_names())
def test_evaluation_takes_batches_and_draws_nothing(name):
    transform, state = evaluation_transform(name, 8, MEAN, STD), torch.get_rng_state()
    batch = torch.stack([image(12, 12), image(12, 12).flip(-1)])
    assert torch.equal(transform.augment(batch), torch.stack([transform.augment(one) for one in batch]))
    assert torch.equal(state, torch.get_rng_state())
    assert not transform.random


def test_bad_names_and_sizes_are_named():
    with pytest.raises(DataError, match=r"training transform must be one of none, digits, .* got 'squash'"):
        train("squash", 8)
    with pytest.raises(DataError, match="evaluation transform must be one of none, squash, center-crop, got 'cifar'"):
        evaluation_transform("cifar", 8, MEAN, STD)
    with pytest.raises(DataError, match="image_size must be at least 1, got 0"):
        train("none", 0)

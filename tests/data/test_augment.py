"""Batched steps do to each image what torchvision does to it alone, given the same numbers; and draw the same distributions."""

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from kdfast.data import augment, training_transform
from kdfast.data.augment import ColorJitter, Cutout, Flip, RandAugment, Rotation
from kdfast.data.framing import CenterCrop, ResizedCrop, Squash, cut, resample
from kdfast.data.seeding import Draws, mix
from tests.data.samples import HALF

OPERATIONS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness"),
    *("Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)  # torchvision's names


def photographs(n=6, height=40, width=56, seed=0):
    """Smooth color images: uint8 [n, 3, height, width]."""
    noise = torch.randn(n, 3, 7, 9, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic")
    return (127 + 70 * smooth).clamp(0, 255).to(torch.uint8)


def draws(n, *key):
    return Draws(*key, index=torch.arange(n))


def difference(a, b):
    """Largest and mean difference, grey levels."""
    d = (a.int() - b.int()).abs()
    return d.max().item(), d.float().mean().item()


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_draws_are_uniform_and_unrelated():
    u = draws(20_000, 3).uniform(3)
    assert (u >= 0).all()
    assert (u < 1).all()
    counts = torch.histc(u.float(), 20, 0, 1)
    assert ((counts / 3000 - 1).abs() < 0.1).all()  # 5.6 deviations
    assert torch.corrcoef(torch.cat([u[:-1], u[1:]], dim=1).T).fill_diagonal_(0).abs().max() < 0.04
    alone = Draws(3, index=torch.tensor([9]))
    assert torch.equal(torch.cat([alone.uniform(1), alone.uniform(2)], dim=1)[0], u[9]), "the other images have no influence"
    assert mix(0, 1) != mix(1, 0)
    assert mix(-1) == mix(2**64 - 1)
    below = draws(20_000, 4).below(7)
    assert (below.bincount() / (20_000 / 7) - 1).abs().max() < 0.1


# ---- framing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [Squash(24), Squash(64), CenterCrop(24), CenterCrop(64)], ids=lambda s: f"{type(s).__name__} {s.size}")
@pytest.mark.parametrize("shape", [(40, 56), (56, 40), (24, 24), (31, 97)], ids=str)
def test_resizing_a_batch_is_torchvisions_within_a_grey_level(step, shape):
    images = photographs(3, *shape)
    frames = step.frames(torch.tensor([shape] * 3), draws(3))
    most, mean = difference(resample(images, frames), torch.stack(cut(images, frames)))
    assert most <= 1
    assert mean < 0.3  # torchvision rounds once more, between the two directions


@pytest.mark.parametrize("size", [16, 48])
def test_crops_are_torchvisions_and_of_a_batch_of_all_sizes_within_a_grey_level(size):
    singles = [photographs(1, h, w, seed=h)[0] for h, w in ((40, 56), (70, 33), (20, 20), (90, 90))] * 4
    sizes = torch.tensor([image.shape[-2:] for image in singles])
    padded = torch.full((len(singles), 3, 90, 90), 255, dtype=torch.uint8)  # pixels beside an image must not be seen
    for place, image in zip(padded, singles):
        place[:, : image.shape[1], : image.shape[2]] = image
    frames = ResizedCrop(size).frames(sizes, draws(len(singles)))
    out, exact = resample(padded, frames), cut(singles, frames)
    for i, image in enumerate(singles):
        top, left, height, width = (int(part[i]) for part in frames[:4])
        expected = functional.resized_crop(image, top, left, height, width, [size, size], antialias=True)
        assert torch.equal(exact[i], expected)
        most, mean = difference(out[i], expected)
        assert most <= 1
        assert mean < 0.3  # torchvision rounds once more, between the two directions


def test_crop_windows_are_distributed_as_torchvisions():
    n, (H, W) = 8000, (120, 160)
    frames = ResizedCrop(32).frames(torch.tensor([[H, W]]).expand(n, 2), draws(n, 11))
    assert ((frames.top >= 0) & (frames.top + frames.height <= H) & (frames.left >= 0) & (frames.left + frames.width <= W)).all()
    torch.manual_seed(0)
    theirs = [v2.RandomResizedCrop(32).make_params([torch.empty(3, H, W)]) for _ in range(n)]
    their = {key: torch.tensor([float(p[key]) for p in theirs]) for key in ("top", "left", "height", "width")}
    ours = {key: getattr(frames, key).float() for key in their}

    def measure(p):
        """Area, aspect, and the relative place of the window."""
        places = p["top"] / (H - p["height"]).clamp(min=1), p["left"] / (W - p["width"]).clamp(min=1)
        return p["height"] * p["width"] / (H * W), (p["width"] / p["height"]).log(), *places

    for a, b in zip(measure(ours), measure(their)):
        quantiles = torch.linspace(0.05, 0.95, 19)
        spread = (b.quantile(0.95) - b.quantile(0.05)).item()
        assert (a.quantile(quantiles) - b.quantile(quantiles)).abs().max() < 0.04 * spread  # about 3.5 deviations


@pytest.mark.parametrize("shape", [(10, 400), (400, 10)], ids=str)
def test_the_middle_is_taken_if_no_crop_fits(shape):
    frames = ResizedCrop(8).frames(torch.tensor([shape] * 50), draws(50))
    torch.manual_seed(0)
    theirs = {tuple(v2.RandomResizedCrop(8).make_params([torch.empty(3, *shape)]).values()) for _ in range(50)}
    assert {tuple(int(part[i]) for part in frames[:4]) for i in range(50)} == theirs
    assert len(theirs) == 1


# ---- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "most_off"), [("brightness", 0), ("contrast", 1), ("saturation", 1), ("hue", 1)])
def test_colors_change_as_by_torchvision(name, most_off):
    images = torch.cat([photographs(6), torch.randint(256, (2, 3, 40, 56), dtype=torch.uint8)])
    images[0] = 77  # grey, which has no hue
    amount = torch.linspace(-0.45, 0.45, len(images))
    ours = getattr(augment, f"adjust_{name}")(images, amount)
    theirs = torch.stack(
        [getattr(functional, f"adjust_{name}")(image, float(a) if name == "hue" else 1 + float(a)) for image, a in zip(images, amount)]
    )
    most, mean = difference(ours, theirs)
    assert most <= most_off
    assert mean < 0.01 if name == "hue" else mean < 0.05


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("operation", range(14), ids=lambda k: OPERATIONS[k])
def test_randaugments_operations_are_torchvisions(operation, sign):
    images, original = photographs(), v2.RandAugment(1, 14)
    ours = images.clone()
    RandAugment(1, 14).apply(ours, torch.full((6,), operation), torch.full((6,), sign, dtype=torch.float64))
    magnitudes, signed = original._AUGMENTATION_SPACE[OPERATIONS[operation]]
    magnitude = magnitudes(31, 40, 56)
    magnitude = 0.0 if magnitude is None else float(magnitude[14]) * (sign if signed else 1)
    apply = original._apply_image_or_video_transform
    theirs = torch.stack(
        [apply(x, OPERATIONS[operation], magnitude, interpolation=original.interpolation, fill=original._fill) for x in images]
    )
    most, mean = difference(ours, theirs)
    assert most <= 1
    assert mean < (0.03 if OPERATIONS[operation] == "Color" else 0.001)
    assert (operation == 0) == torch.equal(ours, images)


def test_randaugment_draws_every_operation_and_sign_alike():
    seen = []
    step = RandAugment(2, 14)
    step.apply = lambda images, operation, sign: seen.append(operation + 14 * (sign > 0))
    step.change(torch.zeros(14_000, 3, 1, 1, dtype=torch.uint8), draws(14_000))
    counts = torch.stack(seen).flatten().bincount(minlength=28)
    assert (counts / 1000 - 1).abs().max() < 0.16  # 5 deviations


def test_rotations_are_torchvisions_and_reach_both_ends():
    images, step = photographs(400, 17, 17), Rotation(10)
    angle = 10 * (2 * draws(400).uniform(1)[:, 0] - 1)
    ours = step.change(images, draws(400))
    theirs = torch.stack([functional.rotate(image, float(a)) for image, a in zip(images, angle)])
    assert (ours != theirs).float().mean() < 1e-4
    assert angle.min() < -9.5
    assert angle.max() > 9.5


def test_jitter_applies_the_four_changes_in_an_order_for_each_image():
    images, strength = photographs(200, 8, 8), 0.2
    numbers = draws(200)
    amount, order = strength * (2 * numbers.uniform(4) - 1), numbers.uniform(4).argsort(dim=1)
    expected = []
    for image, factors, turns in zip(images, amount.tolist(), order.tolist()):
        for k in turns:
            adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, functional.adjust_hue)[k]
            image = adjust(image, factors[k] + (k != 3))
        expected.append(image)
    most, mean = difference(ColorJitter(strength).change(images, draws(200)), torch.stack(expected))
    assert most <= 6  # later changes multiply a difference in rounding
    assert mean < 0.05
    assert len({tuple(turns) for turns in order.tolist()}) == 24


@pytest.mark.parametrize(
    ("name", "padding", "mode"), [("cifar", 4, "constant"), ("cifar-reflect", 4, "reflect"), ("digits", 1, "constant")]
)
def test_shifts_are_windows_of_the_padded_image(name, padding, mode):
    images, places = photographs(300, 12, 12), 2 * padding + 1
    ours = training_transform(name, 12, *HALF).steps[0].change(images, draws(300))
    padded = torch.nn.functional.pad(images.float(), (padding,) * 4, mode=mode).to(torch.uint8)
    numbers = draws(300)
    top, left = numbers.below(places).tolist(), numbers.below(places).tolist()
    assert torch.equal(ours, torch.stack([p[:, y : y + 12, x : x + 12] for p, y, x in zip(padded, top, left)]))
    assert set(top) == set(left) == set(range(places))


def test_half_of_the_images_are_flipped_whole():
    images = photographs(2000, 4, 6)
    ours = Flip().change(images, draws(2000))
    flipped = (ours == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(ours[~flipped], images[~flipped])
    assert 900 < flipped.sum() < 1100


def test_cutout_paints_a_square_anywhere():
    out = Cutout(16, (10, 20, 30)).change(torch.zeros(500, 3, 32, 32, dtype=torch.uint8), draws(500))
    painted = out[:, 0] == 10
    assert torch.equal(out, painted[:, None] * torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1))
    rows, columns = painted.any(2).sum(1), painted.any(1).sum(1)
    assert torch.equal(painted.sum((1, 2)), rows * columns)
    assert rows.max() == columns.max() == 16
    assert rows.min() == columns.min() == 8  # the middle is a pixel of the image, so at least half of each side is in it
    assert abs(painted.float().mean().item() - (16 * 17 + 2 * sum(range(8, 16))) ** 2 / 32**4) < 0.02

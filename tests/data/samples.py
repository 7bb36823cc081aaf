"""Images and splits for the tests of kdfast.data: in memory, as files, good and bad."""

import errno
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kdfast.data import LoaderOptions, Split
from kdfast.data.images import PLAIN
from kdfast.data.loaders import CLASSES

HALF = ((0.5,) * 3, (0.5,) * 3)
LEVELS = ((0.0,) * 3, (1 / 255,) * 3)
"""A normalization that leaves grey levels."""


class Payload:
    """Unpickling this opens a file for writing."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def make_split(n, size=8):
    """N different images in memory; labels 0 1 2 0 1 2 ..."""
    pixels = (torch.arange(n * 3 * size * size) * 7 % 251).to(torch.uint8).view(n, 3, size, size)
    return Split(torch.arange(n) % 3, pixels=pixels)


def write_pngs(folder, n, size=(9, 12)):
    """N PNG files as a split, and that split in memory."""
    folder.mkdir(exist_ok=True)
    memory = make_split(n, size=16)
    pixels = memory.pixels[:, :, : size[0], : size[1]]
    paths = [str(folder / f"{i}.png") for i in range(n)]
    for path, image in zip(paths, pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return Split(memory.labels, paths=tuple(paths)), Split(memory.labels, pixels=pixels)


def make_photograph(seed, size):
    """Shapes and some noise, which suit JPEG; an image of Pillow."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.nn.functional.interpolate(255 * torch.rand(1, 3, 6, 7, generator=random), size, mode="bicubic")[0]
    noisy = coarse + 4 * torch.randn(coarse.shape, generator=random)
    return Image.fromarray(noisy.clamp(0, 255).byte().permute(1, 2, 0).numpy())


def write_photographs(folder, n):
    """N JPEG files of mixed sizes as a split; labels 0 1 2 0 1 2 ..."""
    paths = [str(folder / f"{i}.jpg") for i in range(n)]
    for i, path in enumerate(paths):
        make_photograph(i, (90 + 13 * (i % 5), 80 + 17 * (i % 7))).save(path, quality=90, subsampling=2 * (i % 2))
    return Split(torch.arange(n) % 3, paths=tuple(paths))


def make_loader(name, split, transform, batch_size=4, *, shuffle=True, workers=0, **fields):
    """A loader by name."""
    return CLASSES[name](split, transform, LoaderOptions(batch_size, shuffle=shuffle, workers=workers, **fields))


def same(a, b):
    """Two lists of batches are equal bit for bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for batch_a, batch_b in zip(a, b) for x, y in zip(batch_a, batch_b))


def join_images(loader):
    return torch.cat([batch.images for batch in loader])


def join_index(*loaders):
    return torch.cat([batch.index for loader in loaders for batch in loader])


# ---- files of all kinds ---------------------------------------------------------------------------------------------------------


def make_noise(height: int = 24, width: int = 32, seed: int = 0) -> Image.Image:
    """Noise, so damage anywhere shows."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(form: str, image: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or make_noise()).save(buffer, format=form, **options)
    return buffer.getvalue()


def _claim_png_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def _claim_jpeg_size(width: int, height: int) -> bytes:
    data = bytearray(encode("JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def _damage_png() -> bytes:
    data = bytearray(encode("PNG"))
    data[data.index(b"IDAT") + 200] ^= 0xFF
    return bytes(data)


BAD = {
    "zero.jpg": (b"", r"empty \(0 bytes\)"),
    "truncated.jpg": (encode("JPEG")[:-400], "truncated"),
    "truncated.png": (encode("PNG")[:-400], "truncated"),
    "text.jpg": (b"what a nice picture this would be", "not an image"),
    "random.png": (np.random.default_rng(0).bytes(5000), "not an image"),
    "page.jpeg": (b"<!DOCTYPE html><html><body>404</body></html>", "not an image"),
    "header.jpg": (encode("JPEG").partition(b"\xff\xda")[0], "truncated|cannot"),  # up to the scan
    "chunk.png": (_damage_png(), "broken|decoding|CRC|checksum"),
    "bomb.png": (_claim_png_size(60_000, 60_000), "too large: at most 178,956,970 pixels"),
    "bomb.jpg": (_claim_jpeg_size(60_000, 60_000), "too large: .* claims 60000 x 60000"),
}
SPECIAL = {
    "fifo.jpg": "no regular file",
    "dangling.jpg": os.strerror(errno.ENOENT),
    "loop.jpg": os.strerror(errno.ELOOP),
}
REASONS = {name: reason for name, (_, reason) in BAD.items()} | SPECIAL


def _turn(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6  # the camera was on its side
    return encode("JPEG", image, exif=exif)


NOISE = make_noise()
SIXTEEN = Image.fromarray(np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 80)
TRANSLUCENT = Image.merge("RGBA", [*NOISE.split(), Image.linear_gradient("L").resize(NOISE.size)])
STANDARD = {  # one decoder's pixels are another's
    "colour.jpg": (encode("JPEG"), PLAIN),
    "grey.jpg": (encode("JPEG", NOISE.convert("L")), PLAIN),
    "progressive.jpg": (encode("JPEG", progressive=True), PLAIN),
    "full-colour.jpg": (encode("JPEG", subsampling=0), PLAIN),
    "turned.jpg": (_turn(NOISE), PLAIN),
    "plain.png": (encode("PNG"), "png"),
    "grey.png": (encode("PNG", NOISE.convert("L")), "png"),
}
GOOD = STANDARD | {
    "cmyk.jpg": (encode("JPEG", NOISE.convert("CMYK")), "other jpeg"),
    "rgb.jpg": (encode("JPEG", keep_rgb=True), "other jpeg"),
    "palette.png": (encode("PNG", NOISE.convert("P")), "png"),
    "palette with transparency.png": (encode("PNG", NOISE.convert("P"), transparency=bytes([0, 128, 255])), "png"),
    "translucent.png": (encode("PNG", TRANSLUCENT), "png"),
    "translucent grey.png": (encode("PNG", TRANSLUCENT.convert("LA")), "png"),
    "sixteen.png": (encode("PNG", SIXTEEN), "png"),
    "one bit.png": (encode("PNG", NOISE.convert("1")), "png"),
    "picture.bmp": (encode("BMP"), "bmp"),
    "picture.webp": (encode("WEBP"), "webp"),
    "picture.gif": (encode("GIF", NOISE.convert("P")), "gif"),
    "picture.tif": (encode("TIFF"), "tiff"),
    "picture.ppm": (encode("PPM"), "ppm"),
}


def plant(folder: Path, name: str) -> Path:
    """Writes the file of this name in REASONS or GOOD."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    match name:
        case "fifo.jpg":
            os.mkfifo(path)
        case "dangling.jpg":
            path.symlink_to(folder / "nowhere.jpg")
        case "loop.jpg":
            path.symlink_to(path)
        case _:
            path.write_bytes((BAD | GOOD)[name][0])
    return path


def plant_all(folder: Path) -> list[str]:
    """Every kind of good and bad file."""
    return sorted(str(plant(folder, name)) for name in [*REASONS, *GOOD])


def write_class_folders(root: Path, bad: dict[str, str], each: int = 8) -> Path:
    """root/{train,val}/{cat,dog}/<i>.jpg of 24 x (30 + i), with BAD files at `bad`: path -> name in BAD. The first cat is a PNG."""
    for part in ("train", "val"):
        for kind in ("cat", "dog"):
            (root / part / kind).mkdir(parents=True)
            for i in range(each):
                (root / part / kind / f"{i}.jpg").write_bytes(encode("JPEG", make_noise(24, 30 + i, seed=i)))
    (root / "train" / "cat" / "0.jpg").write_bytes(encode("PNG", make_noise(24, 30)))
    for path, name in bad.items():
        (root / path).write_bytes(BAD[name][0])
    return root


TWO_BAD = {"train/dog/3.jpg": "zero.jpg", "val/cat/5.jpg": "truncated.jpg"}

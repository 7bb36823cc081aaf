"""Decoding of unusual files: grey of more than 8 bits, floats, signs, orientation; files that decoders disagree about."""

import io
import ntpath
import os
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from kdfast.data import DataError, Split, check, evaluation_transform, training_transform
from kdfast.data.images import decode, has_standard_pixels, read_size
from tests.data.samples import BAD, HALF, encode, make_loader, make_noise

U16, I16, U32, I32, F32, I8 = np.uint16, np.int16, np.uint32, np.int32, np.float32, np.int8


def make_tiff(levels: np.ndarray, *, bits: int | None = None, inverted: bool = False, orientation: int = 1) -> bytes:
    """A grey TIFF of one strip with these levels."""
    data, (height, width) = levels.tobytes(), levels.shape
    sample_format = {"u": 1, "i": 2, "f": 3}[levels.dtype.kind]
    tags = [
        (256, 3, width),
        (257, 3, height),
        (258, 3, bits or 8 * levels.itemsize),
        (259, 3, 1),  # not compressed
        (262, 3, 0 if inverted else 1),
        (273, 4, 0),  # the strip, filled in below
        (274, 3, orientation),
        (277, 3, 1),
        (278, 3, height),
        (279, 4, len(data)),
        (339, 3, sample_format),
    ]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = (struct.pack("<HHII", tag, kind, 1, start if tag == 273 else value) for tag, kind, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4) + data


def encode_sixteen(levels: list[int]) -> bytes:
    return encode("PNG", Image.fromarray(np.array([levels], U16)))


GREY = [
    pytest.param(make_tiff(np.array([[0, 1000, 65535]], U16)), [0, 3, 255], id="16 bits"),
    pytest.param(make_tiff(np.array([[0, 1000, 65535]], U16), inverted=True), [255, 252, 0], id="16 bits, white is 0"),
    pytest.param(make_tiff(np.array([[0, 7, 255]], U16) * 256), [0, 7, 255], id="16 bits from 8"),
    pytest.param(make_tiff(np.array([[0, 7, 255]], I32)), [0, 7, 255], id="8 bits in 32"),
    pytest.param(make_tiff(np.array([[0, 7, 255]], U32)), [0, 7, 255], id="8 bits in unsigned 32"),
    pytest.param(make_tiff(np.array([[0, 1000, 65535]], I32)), [0, 3, 255], id="16 bits in 32"),
    pytest.param(make_tiff(np.array([[0, 7, 255]], I16)), [0, 7, 255], id="8 bits in signed 16"),
    pytest.param(make_tiff(np.array([[0, 1000, 32767]], I16)), [0, 7, 255], id="signed 16 bits"),
    pytest.param(make_tiff(np.array([[0, 7, 127]], I8)), [0, 7, 127], id="signed 8 bits"),
    pytest.param(make_tiff(np.array([[0, 0.5, 1]], F32)), [0, 128, 255], id="floats 0 to 1"),
    pytest.param(make_tiff(np.array([[0, 7, 255]], F32)), [0, 7, 255], id="floats 0 to 255"),
    pytest.param(b"P5 3 1 1023\n" + struct.pack(">3H", 0, 511, 1023), [0, 127, 255], id="10 bits in PGM"),
    pytest.param(b"P5 3 1 65535\n" + struct.pack(">3H", 0, 1000, 65535), [0, 3, 255], id="16 bits in PGM"),
    pytest.param(encode_sixteen([0, 1000, 65535]), [0, 3, 255], id="16 bits in PNG"),
]
REFUSED = [
    pytest.param(make_tiff(np.array([[-5, 1000]], I16)), "-5 to 1000", id="signed 16 bits"),
    pytest.param(make_tiff(np.array([[-5, 100]], I8)), "-5 to 100", id="signed 8 bits"),
    pytest.param(make_tiff(np.array([[0, 70000]], I32)), "0 to 70000", id="32 bits"),
    pytest.param(make_tiff(np.array([[0, 2**32 - 1]], U32)), "-1 to 0", id="unsigned 32 bits"),
    pytest.param(make_tiff(np.array([[-0.5, 0.5]], F32)), "-0.5 to 0.5", id="negative floats"),
    pytest.param(make_tiff(np.array([[0, 1000]], F32)), "0 to 1000", id="large floats"),
    pytest.param(make_tiff(np.array([[0, np.nan]], F32)), "nan to nan", id="nan"),
]


@pytest.mark.parametrize(("content", "expected"), GREY)
def test_grey_of_every_depth_is_scaled_to_bytes(tmp_path, content, expected):
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    assert decode(str(path))[:, 0].tolist() == [expected] * 3


@pytest.mark.parametrize(("content", "levels"), REFUSED)
def test_levels_that_cannot_be_scaled_are_named(tmp_path, content, levels):
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.tif: the image cannot be read: grey levels are {levels}, and [^\n]*$"):
        decode(str(path))
    assert list(check([str(path)]).bad) == [str(path)]


@pytest.mark.parametrize(
    ("content", "dark"),
    [
        pytest.param(encode_sixteen([0, 2000, 4095]), True, id="12 bits in 16"),
        pytest.param(make_tiff(np.array([[0, 2000, 4095]], I32)), True, id="12 bits in 32"),
        pytest.param(encode("PNG", Image.new("L", (8, 8), 15)), True, id="dark"),
        pytest.param(encode("PNG", Image.new("L", (8, 8), 16)), False, id="less dark"),
        pytest.param(encode_sixteen([0, 65535]), False, id="16 bits"),
    ],
)
def test_pictures_that_come_out_nearly_black_are_told(tmp_path, content, dark):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for _ in "first", "known":
        assert check([str(path)]).dark == ((str(path),) if dark else ())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["TIFF", "JPEG", "PNG", "WEBP"])
def test_no_orientation_tag_turns_an_image(tmp_path, form, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    path, grey = tmp_path / f"a.{form.lower()}", np.arange(6, dtype=np.uint8).reshape(2, 3)
    path.write_bytes(make_tiff(grey, orientation=orientation) if form == "TIFF" else encode(form, exif=exif))
    stored = torch.from_numpy(grey) if form == "TIFF" else torch.from_numpy(np.array(Image.open(io.BytesIO(encode(form)))))[..., 0]
    assert torch.equal(decode(str(path))[0], stored)
    assert read_size(str(path)) == tuple(stored.shape)


# ---- files that decoders disagree about -----------------------------------------------------------------------------------------

JPEG, PNG = encode("JPEG"), encode("PNG")
TABLES, SCAN = JPEG.index(b"\xff\xc4"), JPEG.index(b"\xff\xda")


def add_chunk(kind: bytes) -> bytes:
    body = kind + b"123"
    return PNG[:33] + struct.pack(">I", 3) + body + struct.pack(">I", zlib.crc32(body)) + PNG[33:]


def damage(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


UNSOUND = {
    "byte before the tables.jpg": JPEG[:TABLES] + b"\0" + JPEG[TABLES:],
    "byte before the scan.jpg": JPEG[:SCAN] + b"\0" + JPEG[SCAN:],
    "12 bits.jpg": damage(JPEG, JPEG.index(b"\xff\xc0") + 4),
    "without end.png": PNG[:-12],
    "cut.png": PNG[:-3],
    "checksum.png": damage(PNG, len(PNG) - 13),
    "critical.png": add_chunk(b"ABCD"),
    "reserved.png": add_chunk(b"abcd"),
    "two headers.png": PNG[:33] + PNG[8:],
}
SOUND = {"fill bytes.jpg": JPEG[:TABLES] + b"\xff\xff" + JPEG[TABLES:], "trailing.jpg": JPEG + b"more", "trailing.png": PNG + b"more"}
SOUND["ancillary.png"] = add_chunk(b"abCd")


@pytest.mark.parametrize("name", UNSOUND | SOUND)
def test_files_that_are_not_sound_are_copied_for_dali_or_named_before(tmp_path, name):
    path = tmp_path / name
    path.write_bytes((UNSOUND | SOUND)[name])
    assert has_standard_pixels(str(path)) == (name in SOUND)
    checked = check([str(path)], cache=False)
    assert checked.bad or (checked.kinds[0] == "jpeg") == (name in SOUND and name.endswith(".jpg"))
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: the extra kdfast[dali]")
    if not checked.bad:
        split = Split(torch.tensor([1]), paths=(str(path),))
        (batch,) = make_loader("dali", split, evaluation_transform("none", 8, (0.0,) * 3, (1 / 255,) * 3))
        assert torch.equal(batch.images[0].round(), split.read(0).float())


# ---- shapes, sizes, threads -----------------------------------------------------------------------------------------------------


LONG = """
    import resource, torch
    from kdfast.data import evaluation_transform
    transform = evaluation_transform("center-crop", 224, (0.5,) * 3, (0.5,) * 3)
    transform.augment(torch.zeros(3, 300, 300, dtype=torch.uint8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    transform.augment(torch.zeros(3, 1, 60_000, dtype=torch.uint8))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_the_middle_of_a_long_image_needs_little_memory():
    grown = subprocess.run([sys.executable, "-c", textwrap.dedent(LONG)], capture_output=True, text=True, check=True)
    assert int(grown.stdout) < 100, "MiB, where the whole image resized has 11,000"


@pytest.mark.parametrize("shape", [(1, 6000), (6000, 1), (3, 20_000)])
def test_the_middle_of_a_long_image_is_that_of_a_shorter_one(shape):
    image = torch.randint(256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = evaluation_transform("center-crop", 8, *HALF)
    middle = image.narrow(1 if shape[0] > shape[1] else 2, max(shape) // 2 - 20, 40)
    assert (transform.augment(image).int() - transform.augment(middle).int()).abs().max() <= 1


def test_long_images_are_resized_one_by_one_on_the_device(tmp_path, monkeypatch):
    module = sys.modules["kdfast.data.loaders.resident"]
    paths = []
    for i, size in enumerate([(1, 900), (900, 1), (40, 40), (50, 60)]):
        make_noise(*size, seed=i).save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    loader = make_loader("resident", Split(torch.arange(4), paths=tuple(paths)), training_transform("imagenet", 16, *HALF), views=2)
    (whole,) = loader
    largest, take = [], module._Store.take
    monkeypatch.setattr(module._Store, "take", lambda *a: largest.append(take(*a)) or largest[-1])
    monkeypatch.setattr(module, "LARGEST_BATCH", 1000)
    (batch,) = loader
    assert max(images.numel() for images in largest) == 50 * 60 * 3
    assert torch.allclose(batch.images, whole.images, atol=0.02)


@pytest.mark.parametrize("name", ["bomb.png", "bomb.jpg", "fifo.png"])
def test_sizes_of_unread_files_are_one_sentence(tmp_path, name):
    path = tmp_path / name
    if name == "fifo.png":
        os.mkfifo(path)
    else:
        path.write_bytes(BAD[name][0])
    with pytest.raises(DataError, match=rf"{name}: [^\n]*(too large|no regular file)[^\n]*$"):
        Split(torch.zeros(1), paths=(str(path),)).measure()


THREADS = """
    import concurrent.futures, sys
    class Threads(concurrent.futures.ThreadPoolExecutor):
        def map(self, *arguments):
            assert {"PIL.Image", "torchvision.io", "torchvision.transforms.v2.functional"} <= set(sys.modules)
            print("threads")
            return super().map(*arguments)
    concurrent.futures.ThreadPoolExecutor = Threads
    import torch
    from kdfast.data import DaliLoader, LoaderOptions, ResidentLoader, Split, evaluation_transform
    name, sizes, *paths = sys.argv[1:]
    split = Split(torch.zeros(4, dtype=torch.int64), paths=tuple(paths), sizes=torch.full((4, 2), 8) if sizes == "known" else None)
    for batch in {"resident": ResidentLoader, "dali": DaliLoader}[name](
        split, evaluation_transform("squash", 8, (0.5,) * 3, (0.5,) * 3), LoaderOptions(4)
    ):
        print(len(batch.labels))
"""


@pytest.mark.parametrize(("name", "sizes"), [("resident", "known"), ("resident", "unknown"), ("dali", "known")])
def test_threads_that_decode_import_nothing(tmp_path, name, sizes):
    """Threads that import modules of one package at the same time may see them half imported."""
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: the extra kdfast[dali]")
    files = [str(tmp_path / file) for file in ("a.jpg", "b.png", "c.gif", "d.webp")]
    for file in files:
        make_noise(8, 8).save(file)
    command = [sys.executable, "-c", textwrap.dedent(THREADS), name, sizes, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("threads\n4\n")


def test_a_verdict_does_not_outlive_the_decoder(tmp_path, monkeypatch):
    path = str(tmp_path / "a.png")
    Path(path).write_bytes(encode("PNG"))
    assert [check([path]).decoded for _ in range(2)] == [1, 0]
    module = sys.modules["kdfast.data.checking"]
    for package in ("Pillow", "torchvision", "nvidia-dali-cuda130"):
        known = module.package_version
        monkeypatch.setattr(module, "package_version", lambda name, known=known, p=package: "next" if name == p else known(name))
        assert [check([path]).decoded for _ in range(2)] == [1, 0]


def test_files_on_two_drives_have_a_cache(monkeypatch):
    module = sys.modules["kdfast.data.checking"]
    monkeypatch.setattr(module, "os", SimpleNamespace(path=ntpath, fsencode=os.fsencode))
    both, one, same = (
        module._locate_cache(names).name
        for names in (["C:\\a\\1.png", "D:\\b\\2.png"], ["C:\\a\\1.png", "C:\\a\\2.png"], ["C:\\a\\x1\\1.png", "C:\\a\\x2\\2.png"])
    )
    assert both != one == same

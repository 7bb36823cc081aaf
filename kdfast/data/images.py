"""Image files: finding them in a folder, and decoding one to three channels of uint8.

JPEG goes through torchvision's decoder, which gives the very pixels of Pillow in less time; all else, and every file that
decoder refuses, goes through Pillow, whose convert("RGB") says what greyscale, palette, CMYK and transparent images become.
"""

import io
import os
import stat
from pathlib import Path

import torch
from torch import Tensor

from kdfast.data.protocol import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
PLAIN = "jpeg"
"""The kind of a file in which every JPEG decoder sees the same image."""
LARGEST = 178_956_970
"""Pixels. Pillow calls more a decompression bomb, and so do we for JPEG, whose decoder would take the memory and then look."""

_TOO_LARGE = f"the image is too large: at most {LARGEST:,} pixels are read"
_JPEG = b"\xff\xd8"
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, Huffman-coded


def decode(path: str) -> Tensor:
    """Reads one image file.

    Args:
        path: any file that Pillow reads; of an animation, its first frame.

    Returns:
        uint8 [3, H, W], stored channels last.

    Raises:
        DataError: the file is missing, no regular file, empty, truncated, no image or larger than LARGEST. Its cause is an OSError
            where the file could not be opened, so that another attempt may end otherwise.
    """
    return decode_kind(path)[0]


def decode_kind(path: str) -> tuple[Tensor, str]:
    """What decode() gives, and what the file is.

    The kind is PLAIN for greyscale and YCbCr JPEG, else the format in Pillow's words, such as "png"; "other jpeg" for CMYK, RGB and
    what torchvision's decoder refuses.
    """
    data = _contents(path)
    if not data:
        raise DataError(f"{path}: the image file is empty (0 bytes)")
    if data.startswith(_JPEG):
        width, height, plain = _jpeg_header(data)
        if width * height > LARGEST:
            raise DataError(f"{path}: {_TOO_LARGE}, this one claims {width} x {height}")
        image = _decode_jpeg(data)
        if image is not None:
            return image, PLAIN if plain else f"other {PLAIN}"
    return _decode_with_pillow(path, data)


def _contents(path: str) -> bytes:
    try:
        # asked before it is opened: opening a FIFO that nobody writes to would wait for ever
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"{path}: the image cannot be opened: it is no regular file")
        return Path(path).read_bytes()
    except OSError as error:
        dangling = isinstance(error, FileNotFoundError) and os.path.islink(path)
        reason = "it is a link to a file that is not there" if dangling else error.strerror
        raise DataError(f"{path}: the image cannot be opened: {reason}") from error


def _jpeg_header(data: bytes) -> tuple[int, int, bool]:
    """Width and height, and whether the colours are grey or YCbCr, which decoders agree on; zeros where there is no header to be read."""
    position, transform = 2, None
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4])
        body = data[position + 4 : position + 2 + length]
        if marker == 0xFF:  # fill bytes may stand before a marker
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) >= 6:  # a frame; those three are tables
            height, width, components = int.from_bytes(body[1:3]), int.from_bytes(body[3:5]), body[5]
            # without Adobe's word on it libjpeg goes by the components' names
            rgb = transform == 0 or (transform is None and body[6::3] == b"RGB")
            return width, height, marker in _FRAMES and (components == 1 or (components == 3 and not rgb))
        if marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            transform = body[11]
        position += 2 + length
    return 0, 0, False


def _decode_jpeg(data: bytes) -> Tensor | None:
    """uint8 [3, H, W], or None for CMYK and for files that the decoder refuses: Pillow then has the last word."""
    from torchvision.io import decode_jpeg

    try:
        image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except RuntimeError:
        return None
    if len(image) == 1:
        image = image.permute(1, 2, 0).repeat(1, 1, 3).permute(2, 0, 1)
    return image if len(image) == 3 else None


def _decode_with_pillow(path: str, data: bytes) -> tuple[Tensor, str]:
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as file:
            image: Image.Image = file
            kind = (file.format or "unknown").lower()
            if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip at 255: a white image
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode == "P" and "transparency" in image.info:  # the same pixels without Pillow's warning
                image = image.convert("RGBA")
            pixels = np.array(image.convert("RGB"))
    except UnidentifiedImageError:
        raise DataError(f"{path}: not an image, or in a format that Pillow cannot read") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path}: {_TOO_LARGE}") from None
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: the image cannot be read: {reason}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1), f"other {PLAIN}" if kind == PLAIN else kind


def size(path: str) -> tuple[int, int]:
    """Height and width of an image, pixels, from the head of its file.

    Raises:
        DataError: the file is missing or no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except OSError as error:  # UnidentifiedImageError is one
        raise DataError(f"{path}: the size of the image cannot be read: {error.strerror or error}") from None


def subfolders(folder: Path) -> list[Path]:
    """The folders directly in `folder`, by name; hidden ones are left out."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def find(folder: Path) -> list[str]:
    """All files in `folder` and below that have an image's ending, in an order that does not depend on the file system.

    What is in them, and whether they are files at all, is for decode() to say, or for kdfast.data.check().

    Raises:
        DataError: a folder cannot be read.
    """
    found = []
    walked = set()
    for parent, folders, files in os.walk(folder, onerror=_unreadable, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in walked:  # a link back to a folder above would be walked round and round
            folders.clear()
            continue
        walked.add((status.st_dev, status.st_ino))
        folders.sort()
        visible = (file for file in files if not file.startswith("."))
        found += [os.path.join(parent, file) for file in visible if file.lower().endswith(EXTENSIONS)]
    found.sort()
    return found


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder cannot be read: {error.strerror}") from None

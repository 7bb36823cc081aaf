"""Image files: finding them in a folder, and decoding one to three channels of uint8.

JPEG goes through torchvision's decoder, which gives the very pixels of Pillow in less time. All other formats, and every file that this
decoder refuses, go through Pillow: its convert("RGB") decides how greyscale, palette, CMYK and transparent images look.
"""

import io
import os
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdfast.data.extras import need
from kdfast.data.protocol import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
PLAIN = "jpeg"
"""The kind of a file in which every JPEG decoder sees the same image."""
LARGEST = 178_956_970
"""Pixels. Pillow calls a larger image a decompression bomb. The same limit holds for JPEG, whose decoder allocates before it checks."""

_TOO_LARGE = f"the image is too large: at most {LARGEST:,} pixels are read"
_JPEG = b"\xff\xd8"
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, Huffman-coded


def decode(path: str) -> Tensor:
    """Reads one image file.

    Args:
        path: any file that Pillow reads; an animation gives its first frame.

    Returns:
        uint8 [3, H, W], stored channels last.

    Raises:
        DataError: the file is missing, not a regular file, empty, truncated, no image or larger than LARGEST. Its cause is an OSError if
            the file could not be opened, so another attempt may succeed.
    """
    return decode_with_kind(path)[0]


def decode_with_kind(path: str) -> tuple[Tensor, str]:
    """The image of decode(), and the kind of the file.

    The kind is PLAIN for greyscale and YCbCr JPEG, "other jpeg" for CMYK, RGB and every JPEG that torchvision's decoder refuses, else the
    format in Pillow's words, such as "png".
    """
    data = read_file(path)
    if not data:
        raise DataError(f"{path}: the image file is empty (0 bytes)")
    if data.startswith(_JPEG):
        width, height, plain = _read_jpeg_header(data)
        if width * height > LARGEST:
            raise DataError(f"{path}: {_TOO_LARGE}, this one claims {width} x {height}")
        image = _decode_jpeg(data)
        if image is not None:
            return image, PLAIN if plain else f"other {PLAIN}"
    return _decode_with_pillow(path, data)


def has_standard_pixels(path: str) -> bool:
    """Reads from the header if every decoder gives the pixels of decode(): true for PLAIN JPEG, and for PNG of 8 bits grey or colour.

    Palettes, transparency, 16 bits and all other formats, of which there are many variants, are not promised.
    """
    Image = need("PIL.Image")
    try:
        data = read_file(path)
        if data.startswith(_JPEG):
            return _read_jpeg_header(data).plain
        with Image.open(io.BytesIO(data)) as image:
            return image.format == "PNG" and image.tile[0].args in ("L", "RGB") and "transparency" not in image.info
    except Exception:  # Pillow's plugins raise exceptions of any type; decode() gives the reason
        return False


def read_file(path: str) -> bytes:
    """The content of a regular file.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        # asked before it is opened: opening a FIFO without a writer would block for ever
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"{path}: the image cannot be opened: it is no regular file")
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the image cannot be opened: {error.strerror}") from error


class _JpegHeader(NamedTuple):
    width: int
    height: int
    plain: bool


def _read_jpeg_header(data: bytes) -> _JpegHeader:
    """The size, and whether the colours are grey or YCbCr, which decoders agree on; zeros if there is no readable header."""
    position, transform = 2, None
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4])
        body = data[position + 4 : position + 2 + length]
        if marker == 0xFF:  # fill bytes may stand before a marker
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) >= 6:  # a frame; those three are tables
            height, width, components = int.from_bytes(body[1:3]), int.from_bytes(body[3:5]), body[5]
            # without Adobe's marker libjpeg goes by the names of the components
            rgb = transform == 0 or (transform is None and body[6::3] == b"RGB")
            return _JpegHeader(width, height, marker in _FRAMES and (components == 1 or (components == 3 and not rgb)))
        if marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            transform = body[11]
        position += 2 + length
    return _JpegHeader(0, 0, False)


def _decode_jpeg(data: bytes) -> Tensor | None:
    """uint8 [3, H, W]; None for CMYK and for files that the decoder refuses, which Pillow then decodes or refuses."""
    try:
        image = need("torchvision.io").decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except RuntimeError:
        return None
    if len(image) == 1:
        image = image.permute(1, 2, 0).repeat(1, 1, 3).permute(2, 0, 1)
    return image if len(image) == 3 else None


def _decode_with_pillow(path: str, data: bytes) -> tuple[Tensor, str]:
    Image = need("PIL.Image")
    try:
        with Image.open(io.BytesIO(data)) as file:
            image = file
            kind = (file.format or "unknown").lower()
            if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip at 255: a white image
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode == "P" and "transparency" in image.info:  # the same pixels without Pillow's warning
                image = image.convert("RGBA")
            pixels = np.array(image.convert("RGB"))
    except Image.UnidentifiedImageError:
        raise DataError(f"{path}: not an image, or in a format that Pillow cannot read") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path}: {_TOO_LARGE}") from None
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: the image cannot be read: {reason}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1), f"other {PLAIN}" if kind == PLAIN else kind


def read_size(path: str) -> tuple[int, int]:
    """Height and width of an image, pixels, from its file's header.

    Raises:
        DataError: the file is missing or no image.
    """
    try:
        with need("PIL.Image").open(path) as image:
            return image.height, image.width
    except OSError as error:  # UnidentifiedImageError is one
        raise DataError(f"{path}: the size of the image cannot be read: {error.strerror or error}") from None


def list_subfolders(folder: Path) -> list[Path]:
    """The folders directly in `folder`, by name, without hidden ones."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def find(folder: Path) -> list[str]:
    """All files in `folder` and below that have an image's ending, in an order that does not depend on the file system.

    Their content is not looked at: see decode() and kdfast.data.check().

    Raises:
        DataError: a folder cannot be read.
    """
    found = []
    walked = set()
    for parent, folders, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in walked:  # a link to a folder above would never end
            folders.clear()
            continue
        walked.add((status.st_dev, status.st_ino))
        folders.sort()
        visible = (file for file in files if not file.startswith("."))
        found += [os.path.join(parent, file) for file in visible if file.lower().endswith(EXTENSIONS)]
    found.sort()
    return found


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder cannot be read: {error.strerror}") from None

"""Image files: finding them in a folder, and decoding one to three channels of uint8.

Baseline JPEG goes through torchvision's decoder, which gives the very pixels of Pillow in less time; all else, and every file that
decoder refuses, goes through Pillow, whose convert("RGB") says what greyscale, palette, CMYK and transparent images become.
"""

import io
import os
from pathlib import Path

import torch
from torch import Tensor

from kdfast.data.protocol import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_JPEG = b"\xff\xd8"


def decode(path: str) -> Tensor:
    """Reads one image file.

    Args:
        path: any file that Pillow reads; of an animation, its first frame.

    Returns:
        uint8 [3, H, W], stored channels last.

    Raises:
        DataError: the file is missing, empty, truncated or no image.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the image cannot be opened: {error.strerror}") from None
    if not data:
        raise DataError(f"{path}: the image file is empty (0 bytes)")
    image = _decode_jpeg(data) if data.startswith(_JPEG) else None
    return _decode_with_pillow(path, data) if image is None else image


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


def _decode_with_pillow(path: str, data: bytes) -> Tensor:
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as file:
            image: Image.Image = file
            if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip at 255: a white image
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode == "P" and "transparency" in image.info:  # the same pixels without Pillow's warning
                image = image.convert("RGBA")
            pixels = np.array(image.convert("RGB"))
    except UnidentifiedImageError:
        raise DataError(f"{path}: not an image, or in a format that Pillow cannot read") from None
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more on broken files
        raise DataError(f"{path}: the image cannot be read: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def subfolders(folder: Path) -> list[Path]:
    """The folders directly in `folder`, by name; hidden ones are left out."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def find(folder: Path) -> list[str]:
    """All images in `folder` and below, in an order that does not depend on the file system.

    Raises:
        DataError: one of them is empty.
    """
    found = []
    for parent, _, files in os.walk(folder, followlinks=True):
        visible = (file for file in files if not file.startswith("."))
        found += [os.path.join(parent, file) for file in visible if file.lower().endswith(EXTENSIONS)]
    found.sort()
    empty = [path for path in found if os.path.getsize(path) == 0]
    if empty:
        others = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise DataError(f"{empty[0]}: the image file is empty (0 bytes){others}")
    return found

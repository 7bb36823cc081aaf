"""Image files: finding them in a folder, and decoding one to three channels of uint8.

JPEG goes through torchvision's decoder, which gives the very pixels of Pillow in less time. All other formats, and every file that this
decoder refuses, go through Pillow: its convert("RGB") decides how greyscale, palette, CMYK and transparent images look. Two things are
done otherwise: grey of more than 8 bits is scaled to 8, where Pillow clips it, and no file is turned by its orientation tag, where Pillow
turns TIFF alone.
"""

import io
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from kdfast.data.extras import need
from kdfast.data.protocol import DataError

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf",
    ".jpx", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".icb", ".vda", ".vst", ".qoi", ".ico",
    ".pcx", ".sgi", ".rgb", ".rgba", ".bw", ".ras", ".dds", ".xbm", ".xpm", ".psd",
)  # fmt: skip
"""Endings of image files: those of all formats that Pillow reads by itself, whatever its version, so that a data set has the same files
everywhere."""
_OTHERS = {  # folders and files that file managers, servers and tools leave beside images, in lower case
    "@eadir", "@recycle", "@__thumb", "#recycle", "#snapshot", "$recycle.bin", "__macosx", "__pycache__", "lost+found",
    "system volume information", "wandb", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip
_RUN_FILES = {".lock", "metrics.jsonl"}  # either shows a run folder of kdfast, with config.toml one that may hold pictures of its curves
PLAIN = "jpeg"
"""The kind of a file in which every JPEG decoder sees the same image."""
LARGEST = 178_956_970
"""Pixels. Pillow calls a larger image a decompression bomb. The same limit holds for JPEG, whose decoder allocates before it checks."""

_TOO_LARGE = f"the image is too large: at most {LARGEST:,} pixels are read"
_JPEG = b"\xff\xd8"
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, Huffman-coded
_SEGMENTS = {*_FRAMES, 0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}  # frames, tables, applications, comments: all before the first scan
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = re.compile(rb"IHDR(%s)*(PLTE(%s)*)?(IDAT)+(%s)*IEND" % ((rb"[a-z][A-Za-z][A-Z][A-Za-z]",) * 3))
_TIFF_BITS, _TIFF_INVERTED, _TIFF_ORIENTATION, _TIFF_FORMAT = 258, 262, 274, 339  # tags


def import_decoders() -> None:
    """Imports what decoding and resizing need: threads that import a module at the same time can find half of it, processes all wait."""
    for module in ("PIL.Image", "torchvision.io", "torchvision.transforms.v2.functional"):
        need(module)
    need("PIL.Image").init()  # Pillow's formats


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


def decode_with_kind(path: str, data: bytes | None = None) -> tuple[Tensor, str]:
    """The image of decode(), and the kind of the file; `data` is the file's content, where it has been read.

    The kind is PLAIN for greyscale and YCbCr JPEG, "other jpeg" for CMYK, RGB and every JPEG that torchvision's decoder refuses, else the
    format in Pillow's words, such as "png".
    """
    data = read_file(path) if data is None else data
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
        if not _is_sound_png(data):
            return False
        with Image.open(io.BytesIO(data)) as image:
            return image.tile[0].args in ("L", "RGB") and "transparency" not in image.info
    except Exception:  # Pillow's plugins raise exceptions of any type; decode() gives the reason
        return False


def _is_sound_png(data: bytes) -> bool:
    """True if all chunks are whole, known and in order. Pillow takes less: it stops where the last pixel is."""
    position, kinds = len(_PNG), b""
    while data.startswith(_PNG) and not kinds.endswith(b"IEND"):
        end = position + 8 + int.from_bytes(data[position : position + 4])
        if end + 4 > len(data) or zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4]):
            return False
        kinds += data[position + 4 : position + 8]
        position = end + 4
    return _PNG_CHUNKS.fullmatch(kinds) is not None


def read_file(path: str) -> bytes:
    """The content of a regular file.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        _check_regular(path)
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the image cannot be opened: {error.strerror}") from error


def _check_regular(path: str) -> None:
    """Checks the kind of a file before it is opened: opening a FIFO without a writer would block for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise DataError(f"{path}: the image cannot be opened: it is no regular file")


class _JpegHeader(NamedTuple):
    width: int
    height: int
    plain: bool


def _read_jpeg_header(data: bytes) -> _JpegHeader:
    """The size, zeros if there is no readable header, and whether all decoders agree on the file: grey or YCbCr of 8 bits, and nothing
    but whole and known segments before the first scan.
    """
    header, position, transform = _JpegHeader(0, 0, False), 2, None
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4])
        body = data[position + 4 : position + 2 + length]
        if marker == 0xFF:  # fill bytes may stand before a marker
            position += 1
            continue
        if marker == 0xDA:  # the first scan
            return header
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) >= 6:  # a frame; those three are tables
            height, width, components = int.from_bytes(body[1:3]), int.from_bytes(body[3:5]), body[5]
            # without Adobe's marker libjpeg goes by the names of the components
            rgb = transform == 0 or (transform is None and body[6::3] == b"RGB")
            header = _JpegHeader(width, height, body[0] == 8 and (components == 1 or (components == 3 and not rgb)))
        if marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            transform = body[11]
        if marker not in _SEGMENTS or length < 2:
            break
        position += 2 + length
    return header._replace(plain=False)


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
            tags = dict(getattr(file, "tag_v2", {}))  # of a TIFF; loading its pixels removes the orientation
            if image.mode.startswith(("I", "F")) or tags.get(_TIFF_FORMAT) == (2,):
                image = Image.fromarray(_scale_to_bytes(np.asarray(image), kind, tags))
            if image.mode == "P" and "transparency" in image.info:  # the same pixels without Pillow's warning
                image = image.convert("RGBA")
            pixels = np.array(image.convert("RGB"))
            pixels = np.ascontiguousarray(_TURNED_BACK.get(tags.get(_TIFF_ORIENTATION, 1), np.asarray)(pixels))
    except Image.UnidentifiedImageError:
        raise DataError(f"{path}: not an image, or in a format that Pillow cannot read") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path}: {_TOO_LARGE}") from None
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: the image cannot be read: {reason}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1), f"other {PLAIN}" if kind == PLAIN else kind


_TURNED_BACK: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # by the value of the orientation tag: undoes what Pillow did
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: np.rot90,
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels, -1),
}


def _scale_to_bytes(grey: np.ndarray, kind: str, tags: Mapping[int, Any]) -> np.ndarray:
    """Scales grey levels of more than 8 bits, of floats or of a signed type to uint8; convert("RGB") would clip or wrap them.

    Raises:
        ValueError: the levels are in none of the ranges that are read.
    """
    low, high = grey.min(), grey.max()
    signed = tags.get(_TIFF_FORMAT) == (2,)
    bits = tags.get(_TIFF_BITS, (16 if grey.itemsize == 2 or kind in ("png", "ppm") else 32,))[0]
    if signed and bits == 8:  # Pillow reads the bytes as if they had no sign
        low, high = grey.view(np.int8).min(), grey.view(np.int8).max()
    if grey.dtype.kind == "f":
        if not 0 <= low <= high <= 255:
            raise ValueError(f"grey levels are {low:g} to {high:g}, and floats are read from 0 to 1 or from 0 to 255")
        levels = (grey * 255).round() if high <= 1 else grey
    elif bits <= 16 and not signed:
        levels = grey >> (bits - 8)
    elif 0 <= low <= high < 2**16:
        levels = grey if high <= 255 else grey >> (7 if bits == 16 else 8)
    else:
        raise ValueError(f"grey levels are {low} to {high}, and integers of {bits} bits are read from 0 to 255 or from 0 to 65535")
    return 255 - levels.astype(np.uint8) if tags.get(_TIFF_INVERTED) == 0 else levels.astype(np.uint8)


def read_size(path: str) -> tuple[int, int]:
    """Height and width of the image of decode(), pixels, from its file's header where Pillow reads that.

    Raises:
        DataError: as decode().
    """
    try:
        _check_regular(path)
        with need("PIL.Image").open(path) as image:
            tags = getattr(image, "tag_v2", {})  # of a TIFF, which Pillow turns
            return tags.get(257, image.height), tags.get(256, image.width)
    except Exception:  # Pillow raises exceptions of any type; decode() reads the file or gives the reason
        height, width = decode(path).shape[-2:]
        return height, width


class Found(NamedTuple):
    """The content of a folder, in an order that does not depend on the file system.

    Attributes:
        images: files with an image's ending.
        others: all other files; hidden ones and those that tools make are not among them.
    """

    images: list[str]
    others: list[str]


def list_subfolders(folder: Path) -> list[Path]:
    """The folders directly in `folder`, by name, without hidden ones, those that tools make, and those of kdfast's runs.

    Raises:
        DataError: a folder cannot be read.
    """
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and _is_visible(entry.name) and not _holds_runs(str(entry)))
    except OSError as error:
        return _refuse_folder(error)


def list_images(folder: Path) -> list[str]:
    """The names of the image files directly in `folder`."""
    return sorted(entry.name for entry in folder.iterdir() if _is_image(entry.name) and not entry.is_dir())


def find(folder: Path) -> Found:
    """Finds the image files in `folder` and below by their endings. Training, data check and predict all walk folders so.

    The files' content is not looked at: see decode() and kdfast.data.check(). A hidden `folder` is walked, hidden folders in it are not.

    Raises:
        DataError: a folder cannot be read.
    """
    found = Found([], [])
    walked = set()
    for parent, folders, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in walked:  # a link to a folder above would never end
            folders.clear()
            continue
        walked.add((status.st_dev, status.st_ino))
        folders[:] = [entry.name for entry in list_subfolders(Path(parent))] if folders else []
        for file in filter(_is_visible, files):
            (found.images if _is_image(file) else found.others).append(os.path.join(parent, file))
    for names in found:
        names.sort()
    return found


def describe_others(folder: Path, others: list[str]) -> str:
    """For example "cats: left out 3 files without an image's ending: .heic 2, .txt 1 (a/1.heic, a/2.heic, a/notes.txt)"."""
    endings = Counter(Path(path).suffix.lower() or "no ending" for path in others)
    counts = ", ".join(f"{ending} {count:,}" for ending, count in endings.most_common(5))
    named = ", ".join([os.path.relpath(path, folder) for path in others[:3]] + ["..."] * (len(others) > 3))
    return f"{folder}: left out {len(others):,} file{'s' * (len(others) > 1)} without an image's ending: {counts} ({named})"


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and _is_visible(name)


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _OTHERS


def _holds_runs(folder: str) -> bool:
    """True for a run folder of kdfast and for a folder of them. The first image decides against it, so class folders cost little."""
    if os.path.exists(os.path.join(folder, "config.toml")) and any(os.path.exists(os.path.join(folder, name)) for name in _RUN_FILES):
        return True
    run, folders = False, []
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_image(entry.name):
                return False
            run = run or entry.name in _RUN_FILES
            folders += [entry.path] * entry.is_dir(follow_symlinks=False)
    return run or any(map(_holds_runs, folders))


def _refuse_folder(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename}: the folder cannot be read: {error.strerror}") from None

#!/usr/bin/env bash
# Pillow 13.0.0: a grey TIFF whose 0 is white is inverted with 8 bits and left inverted with 16, and signed 8-bit levels wrap around.
#
# A TIFF says by its photometric tag whether 0 is black or white. Pillow follows the tag for 8 bits and drops it for 16, where the mode is "I;16"
# either way and nothing tells the negative from the picture. Microscopes and scanners write both kinds. A data set that mixes bit depths
# holds negatives among its images. Signed 8-bit levels are read as unsigned: -3 becomes 253; signed 16-bit levels are right.
#
# Seen with Pillow 13.0.0:
#     8 bits, 0 is white: [255, 245, 55, 0]
#     16 bits, 0 is white: [0, 10, 200, 255] in mode I;16
#     signed 8 bits, -3 -1 0 5: [253, 255, 0, 5]
#     signed 16 bits, -3 -1 0 5: [-3, -1, 0, 5]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 numpy
cat >"$folder/finding.py" <<'PYTHON'
import io
import struct

import numpy as np
from PIL import Image


def make_tiff(levels, white_is_zero=False):
    """One row of grey levels, uncompressed, little-endian, with the tags that TIFF 6.0 asks for."""
    data, bits = levels.tobytes(), levels.dtype.itemsize * 8
    size = (256, 4, len(levels)), (257, 4, 1), (258, 3, bits), (259, 3, 1)
    layout = (262, 3, 0 if white_is_zero else 1), (273, 4, 8), (277, 3, 1), (278, 4, 1), (279, 4, len(data))
    tags = [*size, *layout, (339, 3, 2 if levels.dtype.kind == "i" else 1)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"


def read(levels, **options):
    image = Image.open(io.BytesIO(make_tiff(levels, **options)))
    return np.asarray(image)[0].tolist(), image.mode


grey = np.array([0, 10, 200, 255])
narrow, wide = (read(grey.astype(dtype), white_is_zero=True) for dtype in (np.uint8, np.uint16))
signed = [read(np.array([-3, -1, 0, 5], dtype))[0] for dtype in (np.int8, np.int16)]
print("8 bits, 0 is white:", narrow[0])
print("16 bits, 0 is white:", wide[0], "in mode", wide[1])
print("signed 8 bits, -3 -1 0 5:", signed[0])
print("signed 16 bits, -3 -1 0 5:", signed[1])
assert narrow[0] == [255, 245, 55, 0], "the behaviour has changed"
assert wide == ([0, 10, 200, 255], "I;16"), "the behaviour has changed"
assert signed == [[253, 255, 0, 5], [-3, -1, 0, 5]], "the behaviour has changed"
PYTHON
cd "$folder"
venv/bin/python finding.py

#!/usr/bin/env bash
# One 16-bit grey PNG, three pictures: Pillow 13.0.0 clips it, torchvision 0.29.1 returns 16 bits, DALI 2.4.0 scales it to 8 bits.
#
# Each library is asked for RGB in its usual way. Pillow's convert("RGB") cuts every value above 255, so that nearly all of a photograph is
# white. torchvision's decode_image(mode=RGB) returns uint16 where every other file gives uint8; code that divides by 255 gets values up to
# 257. DALI divides by 257. A network trained with one loader and used with another sees other images, and nothing raises an error.
#
# Seen for a ramp from 0 to 65535, at 0, 1/4, 1/2 and 3/4 of its length:
#     Pillow uint8 [0, 255, 255, 255]
#     torchvision uint16 [0, 16387, 32775, 49163]
#     DALI uint8 [0, 64, 128, 191]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 pillow==13.0.0 nvidia-dali-cuda130==2.4.0 numpy
cat >"$folder/finding.py" <<'PYTHON'
import io

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
file = io.BytesIO()
Image.fromarray(ramp).save(file, "PNG")
data = np.frombuffer(file.getvalue(), np.uint8)


@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def decode():
    return fn.decoders.image(fn.external_source(source=lambda: [data], dtype=types.UINT8))


pipeline = decode()
pipeline.build()
pictures = {
    "Pillow": np.asarray(Image.open(file).convert("RGB")),
    "torchvision": decode_image(torch.from_numpy(data.copy()), mode=ImageReadMode.RGB).permute(1, 2, 0).numpy(),
    "DALI": np.asarray(pipeline.run()[0].at(0)),
}
seen = {name: (picture.dtype.name, picture[::16, 0, 0].tolist()) for name, picture in pictures.items()}
for name, (dtype, values) in seen.items():
    print(name, dtype, values)
assert seen == {
    "Pillow": ("uint8", [0, 255, 255, 255]),
    "torchvision": ("uint16", [0, 16387, 32775, 49163]),
    "DALI": ("uint8", [0, 64, 128, 191]),
}, "the behaviour has changed"
PYTHON
cd "$folder"
venv/bin/python finding.py

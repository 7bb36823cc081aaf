#!/usr/bin/env bash
# safetensors 0.8.0: equal tensors and equal metadata give files of different bytes, if the metadata has more than one key.
#
# The header's "__metadata__" comes from a hash map with a random order, which changes from call to call even within one process. A checksum of
# such a file says nothing of its content, and a reproducible build or a content-addressed store sees a new file each time. With a single
# key, whose value may be JSON that holds all others, the bytes are the same.
#
# Seen with safetensors 0.8.0, 50 calls each:
#     three keys: more than one version
#     one key: 1 version
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy
cat >"$folder/finding.py" <<'PYTHON'
import hashlib

import numpy as np
from safetensors.numpy import save

tensors = {"weight": np.ones(3, np.float32)}


def count_versions(metadata):
    return len({hashlib.sha256(save(tensors, metadata)).hexdigest() for _ in range(50)})


several, single = count_versions({"a": "1", "b": "2", "c": "3"}), count_versions({"a": "1"})
print("three keys:", "more than one version" if several > 1 else "1 version")
print(f"one key: {single} version")
assert several > 1 and single == 1, "the behaviour has changed"
PYTHON
cd "$folder"
venv/bin/python finding.py

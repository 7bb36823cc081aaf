#!/usr/bin/env bash
# PyTorch 2.14.1: a uint8 tensor compared with a Python integer wraps the integer, so the label 156 "equals" the ignore index -100.
#
# `labels == ignore_index` is how training code finds the rows to leave out, and -100 is everybody's ignore index. On uint8 labels, as NumPy
# and image masks give them, the number is cast to uint8 first: -100 becomes 156, and every row of class 156 is left out in silence. int8 has
# the same in the other direction. F.cross_entropy compares in 64 bits and counts class 156; NumPy 2 says False.
#
# Seen with torch 2.14.1 and numpy 2.4.6:
#     torch, uint8 156 == -100: True
#     torch, int8 -100 == 156: True
#     numpy, uint8 156 == -100: False
#     F.cross_entropy ignores class 156: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
cat >"$folder/finding.py" <<'PYTHON'
import numpy as np
import torch
import torch.nn.functional as F

labels = torch.tensor([156], dtype=torch.uint8)
wraps = (labels == -100).item()
wraps_signed = (torch.tensor([-100], dtype=torch.int8) == 156).item()
in_numpy = bool((labels.numpy() == -100).item())
ignored = F.cross_entropy(torch.zeros(1, 200), labels).isnan().item()  # a mean over no rows
print("torch, uint8 156 == -100:", wraps)
print("torch, int8 -100 == 156:", wraps_signed)
print("numpy, uint8 156 == -100:", in_numpy)
print("F.cross_entropy ignores class 156:", ignored)
assert (wraps, wraps_signed, in_numpy, ignored) == (True, True, False, False), "the behaviour has changed"
PYTHON
cd "$folder"
venv/bin/python finding.py

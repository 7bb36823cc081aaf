#!/usr/bin/env bash
# PyTorch 2.14.1: with a tensor as learning rate, ReduceLROnPlateau(factor=0.5) divides the rate by 2 to the power of the number of groups.
#
# An optimizer that gets one tensor as lr puts the same tensor object into every parameter group. ReduceLROnPlateau goes through the groups,
# reads each rate, multiplies it and writes it back in place: the second group reads what the first has written. With a float every group
# has a rate of its own. The rates of ExponentialLR, StepLR and others are computed for all groups before the first is written, and stay right.
#
# Seen with PyTorch 2.14.1, AdamW, two groups, one plateau:
#     float: [0.5, 0.5]
#     Tensor: [0.25, 0.25]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat >"$folder/finding.py" <<'PYTHON'
import torch

rates = {}
for lr in (1.0, torch.tensor(1.0)):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for loss in (1.0, 2.0):
        scheduler.step(loss)
    rates[type(lr).__name__] = [float(group["lr"]) for group in optimizer.param_groups]
for name, values in rates.items():
    print(f"{name}: {values}")
assert rates == {"float": [0.5, 0.5], "Tensor": [0.25, 0.25]}, "the behaviour has changed"
PYTHON
cd "$folder"
venv/bin/python finding.py

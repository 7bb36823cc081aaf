#!/usr/bin/env bash
# lion-pytorch 0.2.5: one NaN in one gradient freezes that element for good, and every parameter stays finite.
#
# torch.sign(NaN) is 0 (numpy.sign(NaN) is NaN). Lion moves a parameter by lr * sign(...), so an element whose gradient or momentum is NaN
# does not move. Its momentum stays NaN, so it never moves again. A check of the parameters or of later losses for NaN finds nothing:
# the optimizer hides the fault that other optimizers show at once.
#
# Seen with lion-pytorch 0.2.5 and PyTorch 2.14.1; the second gradient has a NaN in its third element:
#     step 1: [0.9, 0.9, 0.9, 0.9]
#     step 2: [0.8, 0.8, 0.9, 0.8]
#     step 3: [0.7, 0.7, 0.9, 0.7]
#     momentum is NaN: [False, False, True, False]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 lion-pytorch==0.2.5 numpy
cat >"$folder/finding.py" <<'PYTHON'
import torch
from lion_pytorch import Lion

parameter = torch.nn.Parameter(torch.ones(4))
optimizer = Lion([parameter], lr=0.1)
for step in (1, 2, 3):
    parameter.grad = torch.ones(4)
    if step == 2:
        parameter.grad[2] = float("nan")
    optimizer.step()
    values = [round(x, 4) for x in parameter.tolist()]
    print(f"step {step}: {values}")
nan = optimizer.state[parameter]["exp_avg"].isnan().tolist()
print("momentum is NaN:", nan)
assert values == [0.7, 0.7, 0.9, 0.7] and nan == [False, False, True, False], "the behaviour has changed"
PYTHON
cd "$folder"
venv/bin/python finding.py

#!/usr/bin/env bash
# torchdistill 1.1.5: KDLoss loses its factor of tau squared when alpha is 0, and when no targets are given.
#
# The documented formula is alpha * CE + (1 - alpha) * tau^2 * KL. For alpha = 0, where only the teacher teaches, forward() returns KL without
# tau^2 (losses/mid_level.py). At tau = 4 the loss and its gradient are 16 times smaller than at alpha = 0.000001. A method that trains with
# the teacher alone and one that adds labels therefore get different weights of the teacher's term.
#
# Seen with torchdistill 1.1.5, tau 4:
#     alpha 1e-06 over alpha 0: 16.00
#     with targets over without, at alpha 1e-06: 16.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 torchdistill==1.1.5 numpy
cat >"$folder/finding.py" <<'PYTHON'
import torch
from torchdistill.losses.mid_level import KDLoss

torch.manual_seed(0)
student, teacher = {"fc": {"output": torch.randn(8, 10)}}, {"fc": {"output": torch.randn(8, 10)}}
targets = torch.randint(10, (8,))


def loss(alpha, targets):
    return KDLoss("fc", "output", "fc", "output", temperature=4.0, alpha=alpha)(student, teacher, targets).item()


by_alpha, by_targets = loss(1e-6, targets) / loss(0.0, targets), loss(1e-6, targets) / loss(1e-6, None)
print(f"alpha 1e-06 over alpha 0: {by_alpha:.2f}")
print(f"with targets over without, at alpha 1e-06: {by_targets:.2f}")
assert abs(by_alpha - 16) < 0.01 and abs(by_targets - 16) < 0.01, "the behaviour has changed"
PYTHON
cd "$folder"
venv/bin/python finding.py

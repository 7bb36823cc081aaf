#!/usr/bin/env bash
# PyTorch 2.14.1: get_optimizer_state_dict of an optimizer that has not stepped yet takes a step, and training after it is another one.
#
# torch.distributed.checkpoint.state_dict makes missing state by a step with gradients of zero and a rate of zero. Two things remain of it:
# - AdamW's step counters stand at 1. Its first real update corrects for two steps and is 26 % smaller.
# - A weight decay that does not depend on the rate is applied: pytorch_optimizer 4.1.0's Lion with fixed_decay=True multiplies all
#   parameters by 1 - weight_decay.
# So a program that saves a checkpoint before its first step, or looks at the state, trains differently from one that does not.
#
# Seen with PyTorch 2.14.1 and pytorch_optimizer 4.1.0:
#     AdamW, first update: 0.1 without looking, 0.0744 after looking
#     Lion(fixed_decay=True, weight_decay=0.1): a parameter of 1 is 0.9 after looking
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 pytorch-optimizer==4.1.0 numpy
cat >"$folder/finding.py" <<'PYTHON'
import torch
from pytorch_optimizer import Lion
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def make():
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(module.weight)
    return module


def first_update(look):
    module = make()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.0)
    if look:
        get_optimizer_state_dict(module, optimizer)
    module.weight.grad = torch.ones(1, 1)
    optimizer.step()
    return round(1.0 - module.weight.item(), 4)


plain, looked = first_update(False), first_update(True)
print(f"AdamW, first update: {plain} without looking, {looked} after looking")
module = make()
get_optimizer_state_dict(module, Lion(module.parameters(), fixed_decay=True, weight_decay=0.1))
decayed = round(module.weight.item(), 5)
print(f"Lion(fixed_decay=True, weight_decay=0.1): a parameter of 1 is {decayed} after looking")
assert (plain, looked, decayed) == (0.1, 0.0744, 0.9), "the behaviour has changed"
PYTHON
cd "$folder"
venv/bin/python finding.py

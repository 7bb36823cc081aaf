#!/usr/bin/env bash
# PyTorch 2.14.1: load_state_dict rounds float32 optimizer state of bfloat16 parameters to bfloat16, in silence.
#
# An optimizer may keep float32 momenta for bfloat16 parameters, and state_dict() returns them in float32. Optimizer.load_state_dict casts
# every floating tensor of a parameter's state, except "step", to the parameter's dtype. So loading what state_dict() returned, without any
# change, loses 16 bits of each momentum and changes its dtype; a later step in place then rounds to bfloat16 every time. An optimizer with
# such state has to put the precision back itself (torch.optim.Optimizer, _process_value_according_to_param_policy).
#
# Seen with PyTorch 2.14.1:
#     before: torch.float32 1.899999976158142
#     after:  torch.bfloat16 1.8984375
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat >"$folder/finding.py" <<'PYTHON'
import torch


class Momentum(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter, dtype=torch.float32))
                momentum.mul_(0.9).add_(parameter.grad)
                parameter.sub_(group["lr"] * momentum)


parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
optimizer = Momentum([parameter])
parameter.grad = torch.ones_like(parameter)
optimizer.step()
optimizer.step()
before = optimizer.state[parameter]["momentum"].clone()
optimizer.load_state_dict(optimizer.state_dict())
after = optimizer.state[parameter]["momentum"]
print("before:", before.dtype, before.item())
print("after: ", after.dtype, after.item())
assert before.dtype == torch.float32 and after.dtype == torch.bfloat16 and before.item() != after.item(), "the behaviour has changed"
PYTHON
cd "$folder"
venv/bin/python finding.py

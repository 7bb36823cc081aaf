#!/usr/bin/env bash
# PyTorch 2.11.0: torch.compile gives a sum over processes a gradient of zero, in silence.
#
# An autograd.Function whose forward pass clones its input, sums the clone in place with torch.distributed.all_reduce and returns it has the
# right gradient in eager mode. Compiled, with AOTAutograd alone ("aot_eager") as with Inductor, the value is right and the gradient is zero:
# the traced graph puts a functional collective in the place of the one in place, and the result's link to the Function is lost.
# PyTorch 2.14.1 gives the right gradient. An all_gather into new memory, followed by a sum, is right in both.
#
# Seen with PyTorch 2.11.0 on a CPU, one process, gloo:
#     eager: value 6.0, gradient [2.0, 2.0, 2.0]
#     aot_eager: value 6.0, gradient [0.0, 0.0, 0.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy
cat >"$folder/finding.py" <<'PYTHON'
import tempfile

import torch
import torch.distributed as dist


class SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, upstream):
        return upstream


def loss(x):
    return SumOverProcesses.apply(2.0 * x).sum()


with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    gradients = {}
    for name, function in {"eager": loss, "aot_eager": torch.compile(loss, backend="aot_eager")}.items():
        x = torch.ones(3, requires_grad=True)
        value = function(x)
        value.backward()
        gradients[name] = x.grad.tolist()
        print(f"{name}: value {value.item()}, gradient {gradients[name]}")
    dist.destroy_process_group()
assert gradients == {"eager": [2.0] * 3, "aot_eager": [0.0] * 3}, "the behaviour has changed"
PYTHON
cd "$folder"
venv/bin/python finding.py

#!/usr/bin/env bash
# Triton 3.9.0: tl.sum adds float16 and bfloat16 blocks in their own precision; tl.max of the same block works in float32.
#
# A row of float16 with a sum above 65,504 becomes infinite, and a bfloat16 sum keeps 8 bits at every level of the tree. Integers below 32 bits
# are promoted to 32 bits by tl.sum, so one expects the same of floats. The store to a float32 output does not help: the addition has happened.
# A conversion before the sum, or its argument dtype=tl.float32, does.
#
# Seen with Triton 3.9.0 (3.6.0 and 3.8.0 alike), compiled for sm_90 without a GPU, instructions in the PTX:
#     fp16: sum add.f16, max max.f32
#     bf16: sum add.bf16, max max.f32
#     i8: sum add.s32, max max.s32
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.9.0 numpy
cat >"$folder/finding.py" <<'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def add_up(x, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N)), 0))


@triton.jit
def find_largest(x, out, N: tl.constexpr):
    tl.store(out, tl.max(tl.load(x + tl.arange(0, N)), 0))


def instructions(function, operation, dtype):
    out = "*i32" if dtype == "i8" else "*fp32"
    source = ASTSource(function, {"x": f"*{dtype}", "out": out, "N": "constexpr"}, {"N": 64})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    found = set(re.findall(rf"\b{operation}\.[a-z]+[0-9]+\b", ptx)) - {"add.s64"}
    return sorted(found - {"add.s32"} or found)


seen = {dtype: (instructions(add_up, "add", dtype), instructions(find_largest, "max", dtype)) for dtype in ("fp16", "bf16", "i8")}
for dtype, (added, compared) in seen.items():
    print(f"{dtype}: sum {', '.join(added)}, max {', '.join(compared)}")
assert seen == {
    "fp16": (["add.f16"], ["max.f32"]),
    "bf16": (["add.bf16"], ["max.f32"]),
    "i8": (["add.s32"], ["max.s32"]),
}, "the behaviour has changed"
PYTHON
cd "$folder"
venv/bin/python finding.py

#!/usr/bin/env bash
# Triton 3.8.0: with TRITON_INTERPRET=1, a + b of two bfloat16 tensors adds their bit patterns as integers.
#
# NumPy has no bfloat16, so the interpreter holds such tensors as uint16 and hands them to NumPy's operators. Addition, multiplication,
# negation, tl.sum, tl.where, tl.sort and tl.dot return numbers that have nothing to do with the operands, without an error or a warning;
# comparisons raise one. tl.max and tl.exp after a conversion to float32 are right. The documentation says that bfloat16 is not supported
# there; a kernel that loads bfloat16 and converts first, as most do, works, and one forgotten conversion is a wrong number. Compiled, all of these are right.
#
# Seen with Triton 3.8.0 (and 3.6.0):
#     1.5 + 2.5 = nan (as float32: 4.0)
#     the sum of four ones = -4.3e+37 (as float32: 4.0)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 triton==3.8.0 numpy
cat >"$folder/finding.py" <<'PYTHON'
import importlib.util
import os
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
import torch

Path("kernels.py").write_text("""
import triton
import triton.language as tl


@triton.jit
def add(a, b, out):
    tl.store(out, tl.load(a) + tl.load(b))


@triton.jit
def add_up(a, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(a + tl.arange(0, N)), 0))
""")
spec = importlib.util.spec_from_file_location("kernels", "kernels.py")
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)


def run(dtype):
    out = torch.zeros(2)
    kernels.add[(1,)](torch.tensor([1.5], dtype=dtype), torch.tensor([2.5], dtype=dtype), out[:1])
    kernels.add_up[(1,)](torch.ones(4, dtype=dtype), out[1:], 4)
    return out.tolist()


(sum16, ones16), (sum32, ones32) = run(torch.bfloat16), run(torch.float32)
print(f"1.5 + 2.5 = {sum16:.2g} (as float32: {sum32})")
print(f"the sum of four ones = {ones16:.2g} (as float32: {ones32})")
assert (sum32, ones32) == (4.0, 4.0) and not abs(sum16 - 4.0) < 1 and not abs(ones16 - 4.0) < 1, "the behaviour has changed"
PYTHON
cd "$folder"
venv/bin/python finding.py

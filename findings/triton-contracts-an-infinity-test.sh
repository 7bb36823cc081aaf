#!/usr/bin/env bash
# Triton 3.9.0: the test for infinity `s - s == 0` is compiled to a test of a rounding error, and nearly every finite number fails it.
#
# If s is a product a * b, the compiler contracts a * b - s to fma(a, b, -s): the exact product minus the rounded one, which is not 0 unless the
# product is exact. A kernel that masks infinite scores this way masks almost all scores. Triton's interpreter rounds both times and says that the kernel is right. A comparison of the absolute value with
# infinity is not affected. From Triton 3.10 on fusion is off by default, as 3.9 announces.
#
# Seen with Triton 3.9.0, compiled for sm_90 without a GPU, in the PTX:
#     mul.f32, neg.f32, fma.rn.f32, setp.eq.f32
# and the same arithmetic with 10,000 products of random numbers in NumPy:
#     rounded twice: 100 % pass the test; contracted: below 1 %
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.9.0 numpy
cat >"$folder/finding.py" <<'PYTHON'
import re

import numpy as np
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def mask_infinite(a, b, out):
    s = tl.load(a) * tl.load(b)
    tl.store(out, tl.where(s - s == 0, s, 0.0))


source = ASTSource(mask_infinite, {"a": "*fp32", "b": "*fp32", "out": "*fp32"}, {})
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
found = re.findall(r"\b(?:(?:mul|sub|neg|fma\.rn)\.f32|setp\.eq\.f32)", ptx)
print(", ".join(found))

random = np.random.default_rng(0)
a, b = (random.standard_normal(10_000).astype(np.float32) for _ in range(2))
rounded = a * b
error = a.astype(np.float64) * b - rounded  # exact: a product of two float32 fits into float64
twice, contracted = np.mean(rounded - rounded == 0), np.mean(error == 0)
print(f"rounded twice: {100 * twice:.0f} % pass the test; contracted: {'below 1' if contracted < 0.01 else round(100 * contracted)} %")
assert found == ["mul.f32", "neg.f32", "fma.rn.f32", "setp.eq.f32"] and contracted < 0.01, "the behaviour has changed"
PYTHON
cd "$folder"
venv/bin/python finding.py

"""Fused multiply-adds: compiled code must not compare a product with itself, which fusing makes a rounding error instead of 0."""

import math
import re

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from kdfast.benchmarks import attention_map, binaries, codegen, nce, supcon  # noqa: E402
from kdfast.ops.backend import INTERPRETED  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: kernels are not compiled")

INSTRUCTION = re.compile(r"^\s*(@!?%p\d+\s+)?([\w.]+)\s+(?:\{([^}]*)\}|(%\w+)),(.*);")
fp32, bf16 = torch.float32, torch.bfloat16


class Program:
    """The float32 instructions of compiled code: by register, the instructions that write it."""

    def __init__(self, ptx: str):
        self.writers: dict[str, list[tuple[str, bool, list[str]]]] = {}
        for line in ptx.splitlines():
            if match := INSTRUCTION.match(line):
                predicate, name, several, one, rest = match.groups()
                sources = re.findall(r"%\w+|0f\w+", rest)
                for register in re.findall(r"%\w+", several or one):
                    self.writers.setdefault(register, []).append((name, predicate is None, sources))

    def all(self, name: str) -> list[list[str]]:
        """Sources of every instruction of this name."""
        return [sources for writers in self.writers.values() for other, _, sources in writers if other.startswith(name)]

    def signed(self, value: str, sign: int = 1) -> tuple[int, str]:
        """The register behind copies and negations, and its sign."""
        match self.writers.get(value):
            case [(("mov.b32" | "mov.f32"), True, [source])]:
                return self.signed(source, sign)
            case [("neg.f32", True, [source])]:
                return self.signed(source, -sign)
        return sign, value

    def product(self, factors: list[str]) -> tuple[int, frozenset[str]]:
        signs, values = zip(*map(self.signed, factors))
        return math.prod(signs), frozenset(values)

    def cancelled_products(self) -> list[list[str]]:
        """Sources a, b, c of every fma(a, b, c) where c is -(a b), rounded before."""
        found = []
        for *factors, addend in self.all("fma.rn.f32"):
            sign, register = self.signed(addend)
            for name, _, sources in self.writers.get(register, []):
                own_sign, own = self.product(factors)
                if name.startswith("mul") and len(sources) == 2 and self.product(sources) == (-sign * own_sign, own):
                    found.append([*factors, addend])
        return found

    def fused_exponents(self) -> list[list[str]]:
        """Sources of every fma whose result is the exponent of a power of 2."""
        writers = [writer for (exponent,) in self.all("ex2") for writer in self.writers.get(exponent, [])]
        return [sources for name, _, sources in writers if name.startswith("fma")]


def compiled(launch: binaries.Recorded) -> Program:
    with binaries.absent_gpu("sm_90"):
        kernel = launch.function.warmup(*launch.arguments, grid=launch.grid, **launch.options)
    return Program(kernel.asm["ptx"])


@triton.jit
def _finite(x, y, factor, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    product = tl.load(x + at) * factor
    tl.store(y + at, tl.where(product - product == 0, product, 0.0))


@triton.jit
def _power(x, y, factor, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    product = tl.load(x + at) * factor
    tl.store(y + at, tl.exp2(product - tl.max(product, 0)))


@pytest.mark.parametrize(
    ("function", "fault"), [pytest.param(_finite, "cancelled_products", id="finite"), pytest.param(_power, "fused_exponents", id="power")]
)
def test_planted_fault_is_found(function, fault):
    with binaries.record_launches() as launches:
        function[(1,)](torch.zeros(64), torch.zeros(64), 0.3, BLOCK=64, enable_fp_fusion=True)
    assert getattr(compiled(launches[0]), fault)()


CASES = [
    *(nce.launch(D, dtype, dtype, function) for D, dtype in ((10, fp32), (128, bf16)) for function in ("_losses", "_exponentials")),
    *supcon.step_launches("sm_90", 1024, 64, "labels", bf16),
    *supcon.step_launches("sm_90", 1024, 64, "mask, queue, tf32", fp32),
    *attention_map.stage_launches(attention_map.Maps(64, 8, 8, True, bf16, 2.5), ("_energies", "_gradients", "_compare")),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel}{case.function} {case.C} {case.dtypes} {case.variant}")
def test_kernel_rounds_products_once(case):
    program = compiled(codegen.record([case])[0])
    assert program.writers
    assert not program.cancelled_products()
    # the largest similarity is subtracted from all: it must be rounded as they are
    assert case.kernel != "supcon" or not program.fused_exponents()

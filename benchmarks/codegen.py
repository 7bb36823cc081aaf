"""What the compiler makes of every launch, proven without a GPU: kdfast bench codegen, or python -m kdfast.benchmarks.codegen

A launcher is called on CPU tensors while its launch is recorded instead of run. Triton's own JIT then specializes and compiles it as
it would for a launch on each target, and the binary is read: registers, spills, shared memory, the width of loads and stores, tensor-core
instructions. So what is proven is what is launched. Beside it stand the bytes that the kernel asks for and the least any could.
"""

import math
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
import triton
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kdfast import files, machine
from kdfast.kernels import attention_map, distill_kl, lion, nce, supcon
from kdfast.ops.distill_kl.options import KDOptions
from kdfast.ops.lion.op import Row, scales_of
from kdfast.ops.supcon.op import Setting

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes a program; triton.compile takes any
SPILL_LIMIT = 24  # bytes a thread: register allocation spills so little here and there, each release of Triton elsewhere


# ---- launches --------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """One `function[grid](*arguments, **options)`."""

    function: JITFunction
    grid: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def named(self) -> dict[str, Any]:
        """Arguments and options by name."""
        return dict(zip(self.function.arg_names, self.arguments)) | self.options

    @property
    def plan(self) -> dict[str, int]:
        """Its tile and warps: the integers among the compile-time arguments, and the number of warps."""
        constants = {self.function.arg_names[i] for i in self.function.constexprs}
        tile = {name: value for name, value in self.named.items() if name in constants and type(value) is int}
        return tile | {"warps": self.named.get("num_warps", 4)}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors among the arguments, by the kernel's name for them: x, or x[1] for the second of a tuple."""
        for name, value in self.named.items():
            yield from ((path, leaf) for path, leaf in _leaves(name, value) if isinstance(leaf, Tensor))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _leaves(f"{name}[{i}]", item)
    else:
        yield name, value


def _must_compile() -> None:
    if knobs.runtime.interpret:
        raise RuntimeError("codegen compiles kernels, which it cannot in a process started with TRITON_INTERPRET=1: unset it")


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Kernels launched in the block are not run but listed; tensors may be on the CPU.

    Raises:
        RuntimeError: kernels are interpreted here, not compiled.
    """
    _must_compile()
    launches: list[Launch] = []

    def record(function: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(function, grid, arguments, options))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


class _Absent:
    """A driver for a GPU that is not there: what Triton's JIT asks before it compiles."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_device(self) -> GPUTarget:
        return self.target  # the key under which the JIT keeps what it compiled

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compiled(launches: Iterable[Launch], target: str) -> list["Code"]:
    """What the compiler makes of each launch on the target, one of TARGETS."""

    def compile_one(launch: Launch) -> Code:
        kernel = launch.function.warmup(*launch.arguments, grid=launch.grid, **launch.options)
        return _nvidia(kernel) if TARGETS[target].backend == "cuda" else _amd(kernel)

    driver.set_active(_Absent(TARGETS[target]))
    try:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(compile_one, launches))
    finally:
        driver.set_active(None)  # found again when next asked for


# ---- binaries --------------------------------------------------------------------------------------------------------


class Code(NamedTuple):
    """A compiled kernel's resources and instructions."""

    registers: int  # a thread
    spilled: int  # bytes of stack a thread
    shared: int  # bytes a program
    loads: dict[int, int]  # global loads: bits -> instructions
    stores: dict[int, int]
    products: dict[str, int]  # tensor-core instructions by name
    widths: dict[str, int]  # bits of the narrowest access by argument; NVIDIA only


def _nvidia(kernel: Any) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources, sass = (_cuobjdump(option, file.name) for option in ("--dump-resource-usage", "-sass"))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", resources).groups()
    accesses = {"LDG": Counter(), "STG": Counter()}
    for name, modifiers in re.findall(r"\s(LDG|LDGSTS|STG)((?:\.\w+)*) ", sass):
        bits = re.search(r"\.[US]?(8|16|64|128|256)\b", modifiers)
        accesses[name[:3]][int(bits[1]) if bits else 32] += 1
    products = Counter(re.findall(r"\s(\w+MMA)\b", sass))
    return Code(
        int(registers), int(stack), kernel.metadata.shared, dict(accesses["LDG"]), dict(accesses["STG"]), dict(products), _widths(kernel)
    )


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run([knobs.nvidia.cuobjdump.path, option, path], check=True, capture_output=True, text=True).stdout


def _amd(kernel: Any) -> Code:
    text = kernel.asm["amdgcn"]
    bits = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}
    accesses = {"load": Counter(), "store": Counter()}
    for kind, size in re.findall(r"\b(?:global|buffer|flat)_(load|store)_[us]?(dword(?:x\d)?|short|byte)", text):
        accesses[kind][bits[size]] += 1
    registers, scratch = (int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "private_segment_fixed_size"))
    products = Counter(re.findall(r"\b(v_mfma)_", text))
    return Code(registers, scratch, kernel.metadata.shared, dict(accesses["load"]), dict(accesses["store"]), dict(products), {})


def _widths(kernel: Any) -> dict[str, int]:
    """The narrowest global access through each pointer argument, in bits, from the PTX.

    An address is traced back through the instructions that made it to the one pointer parameter it starts from.
    """
    # PTX parameters are the arguments that are left when tuples are opened and constants taken out
    leaves = [leaf for name, kind in kernel.src.signature.items() for leaf in _leaves(name, kind) if leaf[1] != "constexpr"]
    pointers = {f"param_{i}": name for i, (name, kind) in enumerate(leaves) if kind.startswith("*")}
    made_from: dict[str, set[str]] = {}
    accesses: list[tuple[str, int]] = []
    for line in kernel.asm["ptx"].splitlines():
        if wide := re.search(r"(?:ld|st)\.global\S*?(?:\.v(\d))?\.[busf](\d+)\s.*\[\s*(%rd\d+)", line):
            accesses.append((wide[3], int(wide[1] or 1) * int(wide[2])))
        elif copy := re.search(r"cp\.async\S*\s+\[.*?\],\s*\[\s*(%rd\d+).*?\],\s*0x(\w+)", line):
            accesses.append((copy[1], int(copy[2], 16) * 8))
        elif made := re.search(r"(%rd\d+),\s*(.*);", line):
            made_from.setdefault(made[1], set()).update(re.findall(r"%rd\d+|param_\d+", made[2]))
    widths: dict[str, int] = {}
    for register, bits in accesses:
        if (origin := _origin(register, made_from, pointers)) is not None:
            name = pointers[origin]
            widths[name] = min(bits, widths.get(name, bits))
    return widths


def _origin(register: str, made_from: dict[str, set[str]], pointers: dict[str, str]) -> str | None:
    """The parameter that an address starts from; None where it was itself loaded."""
    seen, todo = set(), {register}
    while todo:
        seen |= todo
        todo = set().union(*(made_from.get(r, set()) for r in todo)) - seen
    origins = seen & pointers.keys()
    if len(origins) > 1:
        raise ValueError(f"the address in {register} starts from several parameters: {', '.join(sorted(origins))}")
    return next(iter(origins), None)


def problems(launch: Launch, code: Code, target: str, wide: tuple[int, int] = (0, 0)) -> list[str]:
    """What is wrong with a compiled launch: spills, too much shared memory, rows accessed in smaller pieces than they allow.

    Args:
        launch: what was compiled.
        code: what came of it.
        target: for which of TARGETS.
        wide: how many loads and stores of 128 bits there must be.
    """
    found = []
    if "enable_fp_fusion" not in launch.options:
        found.append("does not state enable_fp_fusion, whose default differs between releases")
    if code.spilled > SPILL_LIMIT:
        found.append(f"spills {code.spilled} bytes a thread")
    if code.shared > SHARED_LIMIT[target]:
        found.append(f"needs {code.shared:,} bytes of shared memory, {SHARED_LIMIT[target]:,} are there")
    for name, tensor in launch.tensors():
        if tensor.dim() > 1 and tensor.is_floating_point() and name in code.widths and code.widths[name] < _row_width(tensor):
            found.append(f"{name} is accessed {code.widths[name]} bits at a time, its rows allow {_row_width(tensor)}")
    for kind, counted, least in (("loads", code.loads, wide[0]), ("stores", code.stores, wide[1])):
        if counted.get(128, 0) < least:
            found.append(f"has {counted.get(128, 0)} {kind} of 128 bits, a whole block needs {least}")
    return found


def _row_width(rows: Tensor) -> int:
    """Bits, at most 128, that address, length and stride of the rows are multiples of."""
    size = rows.element_size()
    return 8 * math.gcd(16, rows.data_ptr(), rows.shape[-1] * size, rows.stride(-2) * size)


# ---- cases -----------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One launch of a launcher that is called on CPU tensors."""

    kernel: str
    N: int
    C: int  # classes, or features; of Lion, elements
    dtypes: str  # of the student and the teachers, or of the features
    variant: str
    launch: Callable[[], Any]
    moved: int  # bytes of [N, C] tensors that loads and stores ask for; of a walk over an N x N matrix, operations
    floor: int  # the least that any kernel could
    function: str | None = None  # which of the launches is meant, where the launcher makes several
    wide: tuple[int, int] = (0, 0)  # loads and stores of 128 bits that there must be: of a kernel that looks its tensors up


class Variant(NamedTuple):
    """What a call of kd_loss asks for, as far as it changes the kernel."""

    K: int = 1  # teachers; none: the cross-entropy alone
    standardize: bool = False
    ce: bool = False
    divergence: str = "forward"
    student: bool = True  # its gradient is wanted
    teachers: bool = False  # theirs are
    upstream: bool = False  # the gradient of the loss is given
    reduction: str = "mean"


VARIANTS = {
    "ce": Variant(0, ce=True),
    "kd": Variant(),
    "lskd+ce": Variant(standardize=True, ce=True),
    "lskd+ce, 5 teachers": Variant(5, standardize=True, ce=True),
    "mutual js": Variant(standardize=True, ce=True, divergence="js", teachers=True, upstream=True, reduction="none"),
    "mutual js, 5 teachers": Variant(5, standardize=True, ce=True, divergence="js", teachers=True, upstream=True),
    "kd, no gradient": Variant(student=False),
    "lskd+ce, no gradient": Variant(standardize=True, ce=True, student=False),
    "lskd, upstream": Variant(standardize=True, upstream=True),
    "mutual kd": Variant(teachers=True, upstream=True),
    "reverse": Variant(divergence="reverse"),
    "js, 2 teachers": Variant(2, standardize=True, divergence="js"),
}
COMMON = ("lskd+ce", "lskd+ce, 5 teachers", "mutual js")
ROWS = 5  # N: nothing is run, and the plan depends on C alone


def distill_kl_cases() -> Iterator[Case]:
    """Every plan with what it is mostly asked and what fills its registers; every variant in each regime."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    yield distill_kl_case(1, "kd", fp32, fp32)
    for C in (2, 4, 8, 10, 20, 50, 100, 200, 500, 1000, 1001, 1024, 2048, 4096, 8192, 32000, 32003, 131072):
        for variant in VARIANTS if C in (100, 1000, 8192, 32000) else COMMON:
            yield distill_kl_case(C, variant, fp32, fp32)
        yield rescale_case(C, fp32)
    for C in (10, 100, 1000, 1001, 4096, 8192, 32000, 32003):
        for variant in COMMON:
            yield distill_kl_case(C, variant, bf16, bf16)
        yield distill_kl_case(C, "lskd+ce", fp32, bf16)
    yield distill_kl_case(1000, "lskd+ce", fp16, fp16)
    yield rescale_case(1000, bf16)


def distill_kl_case(C: int, variant: str, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> Case:
    """loss_and_gradients on [ROWS, C]."""
    v = VARIANTS[variant]
    dtypes = (student_dtype, *[teacher_dtype] * v.K)
    wanted = (v.student, *[v.teachers] * v.K)
    options = KDOptions(
        temperature=2.0, standardize=v.standardize, eps=1e-7, kd_weight=0.9 if v.K else 0.0, ce_weight=0.1 if v.ce else 0.0,
        teacher_weights=(1.0,) * v.K, label_smoothing=0.1, ignore_index=-100, divergence=v.divergence, reduction=v.reduction,
    )  # fmt: skip

    def launch() -> None:
        student, *teachers = [torch.zeros(ROWS, C, dtype=dtype) for dtype in dtypes]
        labels = torch.zeros(ROWS, dtype=torch.int64) if v.ce else None
        upstream = torch.ones(ROWS if v.reduction == "none" else ()) if v.upstream else None
        distill_kl.loss_and_gradients(student, teachers, labels, options, wanted, upstream)

    sizes = [ROWS * C * dtype.itemsize for dtype in dtypes]
    reads = distill_kl.reads(C, v.K, wanted, standardize=v.standardize, divergence=v.divergence)
    read = reads * sum(sizes) // len(sizes)  # inputs of two dtypes are in cases that read each equally often
    if reads > len(sizes) and v.ce and v.teachers:
        read += sizes[0]  # a store to the teachers' gradients keeps the compiler from merging the last walk's two loads of a step
    written = sum(size for size, want in zip(sizes, wanted) if want)
    return Case("distill_kl", ROWS, C, _names(*dtypes[:2]), variant, launch, read + written, sum(sizes) + written)


def rescale_case(C: int, dtype: torch.dtype) -> Case:
    """Rescale on a gradient [ROWS, C], by a factor that is not 1."""

    def launch() -> None:
        distill_kl.rescale([torch.zeros(ROWS, C, dtype=dtype)], torch.tensor(2.0), torch.tensor(1.0))

    moved = 2 * ROWS * C * dtype.itemsize
    return Case("distill_kl", ROWS, C, _names(dtype), "rescale", launch, moved, moved)


class SupConVariant(NamedTuple):
    """What a call of supcon_loss asks for, as far as it changes the kernels."""

    normalize: bool = False
    duplicates: int = 1
    masked: bool = False
    contrast: int = 0  # rows that are no anchors
    precision: str = "highest"  # of float32 products


SUPCON_VARIANTS = {
    "labels": SupConVariant(),
    "labels, tf32": SupConVariant(precision="high"),
    "normalize, 2 views": SupConVariant(normalize=True, duplicates=2),
    "mask, queue": SupConVariant(masked=True, contrast=64),
    "mask, queue, tf32": SupConVariant(masked=True, contrast=64, precision="high"),
}
DEVICES = {
    "sm_80": supcon.Device(SHARED_LIMIT["sm_80"]),
    "sm_90": supcon.H100,
    "sm_100": supcon.Device(SHARED_LIMIT["sm_100"], tensor_memory=True),
    "gfx942": supcon.Device(SHARED_LIMIT["gfx942"]),
}


def supcon_cases(target: str) -> Iterator[Case]:
    """Every plan of both walks on the target, and what stands beside them."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    for N in (1024, 8192):
        for D in (64, 128, 256, 512, 2048):
            for variant in ("labels", "normalize, 2 views", "mask, queue"):
                yield from supcon_step(target, N, D, variant, bf16)
        for D in (64, 128, 256, 512):
            for variant in ("labels, tf32", "mask, queue, tf32"):
                yield from supcon_step(target, N, D, variant, fp32)
    for D in (64, 128, 512):
        yield from supcon_step(target, 8192, D, "labels", fp32)
    yield from supcon_step(target, 8192, 128, "labels", fp16)
    for D, dtype in ((10, fp32), (128, bf16), (2048, bf16)):
        yield from supcon_step(target, 8192, D, "normalize, 2 views", dtype, ("_prepare", "_finish"))
    yield from supcon_step(target, 8192, 128, "labels", bf16, ("_first_of_name", "_losses", "_shares"))


def supcon_step(
    target: str, N: int, D: int, variant: str, dtype: torch.dtype, functions: Sequence[str] = ("_denominators", "_gradients")
) -> Iterator[Case]:
    """Launches of one training step of the loss: the two walks, or those of the functions."""
    v = SUPCON_VARIANTS[variant]
    setting = Setting(0.07, 1.0, v.duplicates, False, v.normalize)

    def launch() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(v.precision)
        try:
            with mock.patch.object(supcon, "_kind", return_value=DEVICES[target]):
                anchors, others = torch.zeros(N, D, dtype=dtype), torch.zeros(v.contrast, D, dtype=dtype)
                names, mask = torch.zeros(N, dtype=torch.int64), torch.zeros(4, 4) if v.masked else None
                kept = supcon.forward(anchors, others, names, mask, setting)[1]
                supcon.backward(torch.ones(N), anchors, others, names, mask, kept, setting, v.contrast > 0)
        finally:
            torch.set_float32_matmul_precision(before)

    precision = "ieee" if dtype == torch.float32 and v.precision == "highest" else "tf32"
    slice = supcon.plans(N, -(-D // 8) * 8, dtype, precision, v.masked, DEVICES[target]).slice
    forward, backward = supcon.operations(N, D, slice)
    counted = {"_denominators": (forward, forward), "_gradients": (backward, 4 * N**2 * D)}
    for function in functions:
        moved, floor = counted.get(function, (1, 1))
        yield Case("supcon", N, D, _names(dtype), f"{variant}, N {N}", launch, moved, floor, function)


NCE_SHAPE = 64, 16384, 50_000  # B, K and the bank's rows, as CRD trains on CIFAR


def nce_cases() -> Iterator[Case]:
    """Every plan, every pair of dtypes, with and without a gradient, and what stands beside the walk."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    for D in (4, 16, 32, 64, 100, 101, 128, 256, 512, 1024, 2048, 4096, 8192):
        yield nce_case(D, fp32, fp32, "_losses")
        yield nce_case(D, bf16, bf16, "_losses")
    for function in ("_losses", "_losses, no gradient", "_exponentials"):
        for dtypes in ((fp32, fp32), (bf16, fp32), (fp32, bf16), (fp16, fp32), (fp16, bf16)):
            yield nce_case(128, *dtypes, function)
    for D in (100, 101, 128, 8192):
        yield nce_case(D, fp32, fp32, "_finish")
    yield nce_case(128, fp32, fp32, "_settle")


def nce_case(D: int, anchors_dtype: torch.dtype, bank_dtype: torch.dtype, function: str) -> Case:
    """One launch of the loss or of its normalizer."""
    name, with_gradient = function.split(",")[0], "no gradient" not in function

    def launch() -> None:
        anchors = torch.zeros(NCE_SHAPE[0], D, dtype=anchors_dtype)
        bank = torch.empty(NCE_SHAPE[2], D, dtype=bank_dtype)  # never touched: nothing is run
        indices = torch.zeros(NCE_SHAPE[0], 1 + NCE_SHAPE[1], dtype=torch.int64)
        nce.loss_and_gradient(anchors, bank, indices, torch.ones(()), 0.07, 0.0, 0.0, with_gradient)
        nce.normalizer(anchors, bank, indices, torch.ones(()), 0.07)

    moved = floor = 1
    if name in ("_losses", "_exponentials"):
        moved = nce_bytes(*NCE_SHAPE[:2], D, anchors_dtype, bank_dtype, with_gradient and name == "_losses")
        floor = nce_floor(*NCE_SHAPE[:2], D, bank_dtype)
    return Case("nce", NCE_SHAPE[0], D, _names(anchors_dtype, bank_dtype), function, launch, moved, floor, name)


def nce_floor(B: int, K: int, D: int, bank_dtype: torch.dtype) -> int:
    """Bytes of every gathered row and its index, once."""
    return B * (1 + K) * (D * bank_dtype.itemsize + 8)


def nce_bytes(B: int, K: int, D: int, anchors_dtype: torch.dtype, bank_dtype: torch.dtype, with_gradient: bool) -> int:
    """Bytes that a walk asks for: the floor, and for every part its anchor, Z and what it sums up."""
    split, _ = nce.parts(B, 1 + K, nce.plan(D)[0])
    each = D * anchors_dtype.itemsize + 4 + 4 * (1 + D * with_gradient)
    return nce_floor(B, K, D, bank_dtype) + B * split * each


class LionVariant(NamedTuple):
    """What a step asks for, as far as it changes the kernel."""

    rounding: str = "nearest"
    cautious: bool = False
    scaled: bool = False  # by a loss scale or clipping, with a rate on the device


LION_VARIANTS = {
    "plain": LionVariant(),
    "scaled, lr on device": LionVariant(scaled=True),
    "cautious": LionVariant(cautious=True),
    "stochastic": LionVariant("stochastic"),
    "kahan": LionVariant("kahan"),
    "kahan, cautious, scaled": LionVariant("kahan", True, True),
}
ELEMENTS = 100_003  # of a Lion step's tensor: whole blocks, and one that is not


def lion_cases(target: str) -> Iterator[Case]:
    """Every combination of dtypes that training has, with every rounding."""
    fp32, bf16, fp16, int8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
    for dtypes in ((fp32, fp32, fp32), (fp32, fp32, bf16), (fp32, bf16, fp32), (fp32, fp32, int8)):
        for variant in ("plain", "scaled, lr on device", "cautious"):
            yield from lion_launches(target, variant, *dtypes)
    for dtypes in ((bf16, bf16, bf16), (bf16, bf16, fp32), (bf16, fp32, fp32), (bf16, bf16, int8), (fp16, fp16, fp16), (fp16, fp16, fp32)):
        for variant in ("plain", "stochastic", "kahan", "kahan, cautious, scaled"):
            yield from lion_launches(target, variant, *dtypes)


def lion_launches(target: str, variant: str, param: torch.dtype, grad: torch.dtype, momentum: torch.dtype) -> Iterator[Case]:
    """The step, and what a cautious one counts first."""
    v = LION_VARIANTS[variant]

    def launch() -> None:
        p, g, m = (torch.zeros(ELEMENTS, dtype=dtype) for dtype in (param, grad, momentum))
        row = Row(p, g, m, torch.zeros(scales_of(ELEMENTS)), torch.zeros_like(p), torch.zeros(()))
        with mock.patch.object(lion, "WARPS", lion.warps(TARGETS[target].warp_size)):
            lion.step(
                row, lion.table([row]), [p, m], lr=torch.ones(()) if v.scaled else 1e-4, betas=(0.9, 0.99), weight_decay=0.1,
                rounding=v.rounding, cautious=v.cautious, maximize=False,
                grad_factor=torch.ones(()) if v.scaled else None, found_inf=torch.zeros(()) if v.scaled else None,
            )  # fmt: skip

    kahan = v.rounding == "kahan"
    counted = (grad, momentum)
    loaded, stored = (param, grad, momentum, *[param] * kahan), (param, momentum, *[param] * kahan)
    names = "/".join(_names(dtype) for dtype in (param, grad, momentum))
    if v.cautious:
        yield Case("lion", 1, ELEMENTS, names, variant, launch, _bytes(counted), _bytes(counted), "_count_moving", (_wide(counted), 0))
    moved = _bytes(loaded) + _bytes(stored)
    yield Case("lion", 1, ELEMENTS, names, variant, launch, moved, moved, "_step", (_wide(loaded), _wide(stored)))


class Maps(NamedTuple):
    """A stage of attention_transfer_loss, as far as it changes the kernels; student and teacher are alike."""

    C: int
    H: int
    W: int
    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    p: float = 2.0


IMAGES = 2  # B: nothing is run, and no plan depends on it


def attention_map_cases() -> Iterator[Case]:
    """Every plan for 16 channels and 33 pixels or more, as wide as its rows can be; smaller maps, every kind of power, comparisons."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    both = ("_energies", "_gradients")
    seen = set()
    for channels_last in (False, True):
        for dtype in (fp32, bf16):
            for C in (2**i + odd for i in range(4, 12) for odd in (0, 1)):
                for side in (7, 8, 14, 56):
                    V = math.gcd(8, C if channels_last else side**2)
                    key = channels_last, dtype, V, attention_map.plan(C, side**2, channels_last, dtype.itemsize, V)
                    if key not in seen:
                        seen.add(key)
                        yield from attention_map_stage(Maps(C, side, side, channels_last, dtype), both)
            for C, H, W in ((2048, 1, 1), (5, 3, 1), (64, 112, 112)):
                yield from attention_map_stage(Maps(C, H, W, channels_last, dtype), both)
        for p in (1.0, 3.0, 0.5, 2.5, 4.0):
            yield from attention_map_stage(Maps(256, 56, 56, channels_last, bf16, p), both)
        yield from attention_map_stage(Maps(256, 56, 56, channels_last, fp16), both)
    for side in (1, 7, 8, 14, 28, 32, 56, 112):
        yield from attention_map_stage(Maps(64, side, side), ("_compare",))


def attention_map_stage(maps: Maps, functions: Sequence[str]) -> Iterator[Case]:
    """Launches of a training step, in which the student's gradient is wanted: those of the functions."""
    C, P, channels_last = maps.C, maps.H * maps.W, maps.channels_last

    def launch() -> None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        student, teacher = (torch.zeros(IMAGES, C, maps.H, maps.W, dtype=maps.dtype).to(memory_format=layout) for _ in range(2))
        _, (slopes,) = attention_map.loss_and_slopes([student], [teacher], maps.p, [True, False])
        attention_map.gradient(student, slopes, torch.ones(()), maps.p)

    features, energies = IMAGES * C * P * maps.dtype.itemsize, IMAGES * P * 4
    # a launch's accesses of the features are seen by their rows (`problems`); the comparison's tensors have one dimension
    counted = {
        "_energies": (features + energies, features, (0, 0)),
        "_gradients": (2 * features + energies, 2 * features, (0, 0)),
        "_compare": (7 * energies, 3 * energies, (0, 0) if P % 4 or P < 128 else (6, 1)),  # threads of small blocks have fewer elements
    }
    variant = f"{maps.H} x {maps.W}{', channels_last' * channels_last}{f', p {maps.p:g}' * (maps.p != 2)}"
    for function in functions:
        yield Case("attention_map", IMAGES, C, _names(maps.dtype), variant, launch, *counted[function][:2], function, counted[function][2])


def _bytes(dtypes: Sequence[torch.dtype]) -> int:
    return sum(ELEMENTS * dtype.itemsize for dtype in dtypes)


def _wide(dtypes: Sequence[torch.dtype]) -> int:
    """Accesses of 128 bits that a thread of a whole block makes; 8 elements a thread are no 128 bits of int8."""
    return sum(lion.ELEMENTS_A_THREAD * dtype.itemsize // 16 for dtype in dtypes)


def _names(*dtypes: torch.dtype) -> str:
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}
    return " ".join(dict.fromkeys(short[dtype] for dtype in dtypes))


# ---- table -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codegen:
    """Registers, spills, shared memory, load widths and bytes moved of every kernel and launch plan; needs no GPU."""

    targets: tuple[Literal["sm_80", "sm_90", "sm_100", "gfx942"], ...] = ("sm_80", "sm_90", "sm_100", "gfx942")
    """Architectures to compile for."""
    out: Path | None = None
    """Also write the numbers, with machine and versions, to this JSON file."""


def _launches(cases: Sequence[Case]) -> list[Launch]:
    """The launch that each case means; cases of one call share its recording."""
    recordings: dict[Callable[[], Any], list[Launch]] = {}
    for case in cases:
        if case.launch not in recordings:
            with recorded() as recordings[case.launch]:
                case.launch()
    return [next(made for made in recordings[case.launch] if case.function in (None, made.function.__name__)) for case in cases]


def measure(cases: Sequence[Case], target: str) -> list[dict[str, Any]]:
    """One entry a case: what its launch compiles to, the bytes it moves, and what is wrong with it.

    Raises:
        RuntimeError: this process interprets kernels.
    """
    _must_compile()
    launches = _launches(cases)
    return [
        {
            **{name: getattr(case, name) for name in ("kernel", "N", "C", "dtypes", "variant")},
            "function": launch.function.__name__,
            "plan": launch.plan,
            "target": target,
            **code._asdict(),
            "bytes_moved": case.moved,
            "bytes_floor": case.floor,
            "problems": problems(launch, code, target, case.wide),
        }
        for case, launch, code in zip(cases, launches, compiled(launches, target), strict=True)
    ]


def run(options: Codegen) -> list[dict[str, Any]]:
    """Compiles, prints the table, and writes options.out where asked to.

    Returns:
        One entry a case and target, see measure().

    Raises:
        RuntimeError: this process interprets kernels.
    """
    if options.out is not None:
        files.check_writable(options.out, "--out")
    entries = [
        entry
        for target in options.targets
        for entry in measure(
            [*distill_kl_cases(), *supcon_cases(target), *nce_cases(), *lion_cases(target), *attention_map_cases()], target
        )
    ]
    console = Console(width=200, soft_wrap=True, highlight=False)  # a case is one line, also where the output goes to a file
    console.print(table(entries))
    wrong = [entry for entry in entries if entry["problems"]]
    for entry in wrong:
        console.print(f"{entry['target']}, C {_titled(entry)}: {'; '.join(entry['problems'])}", style="red", markup=False)
    console.print(f"Triton {triton.__version__}: {len(entries)} kernels compiled, {len(wrong)} with a problem")
    if options.out is not None:
        facts = machine.facts() | {"triton": triton.__version__}
        files.write_json(options.out, {"machine": facts, "date": time.strftime("%Y-%m-%d"), "cases": entries})
    return entries


def table(entries: Iterable[dict[str, Any]]) -> Table:
    """A row a case and target. Loads and stores are instructions by width in bits; moved are bytes, or operations (see Case)."""
    made = Table(box=box.SIMPLE_HEAD)
    for column in ("target", "kernel", "case", "plan"):
        made.add_column(column, no_wrap=True)
    for column in ("registers", "spills", "shared", "loads", "stores", "tensor cores", "moved / floor"):
        made.add_column(column, justify="right", no_wrap=True)
    for entry in entries:
        made.add_row(
            entry["target"],
            entry["kernel"] + entry["function"],
            _titled(entry),
            " ".join(f"{name.lower()} {value}" for name, value in entry["plan"].items()),
            *(str(entry[name]) for name in ("registers", "spilled", "shared")),
            *(_counted(entry[name]) for name in ("loads", "stores", "products")),
            f"{entry['bytes_moved'] / entry['bytes_floor']:.2f}",
            style="red" if entry["problems"] else None,
        )
    return made


def _titled(entry: dict[str, Any]) -> str:
    return f"{entry['C']} {entry['dtypes']}, {entry['variant']}"


def _counted(instructions: dict[Any, int]) -> str:
    return " ".join(f"{count}x{kind}" for kind, count in sorted(instructions.items(), reverse=True))


if __name__ == "__main__":
    run(tyro.cli(Codegen))

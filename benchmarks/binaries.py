"""Machine code without a GPU: launches are recorded instead of run, compiled for a target, and the binary is read.

Triton's own JIT specializes and compiles a recorded launch as it would on a GPU, so the code that is judged is the code that is launched.
"""

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes a program; triton.compile refuses none
SPILL_LIMIT = 24  # bytes a thread: register allocation spills that little in places that differ by release of Triton


# ---- recording and compiling --------------------------------------------------------------------------------------------------------


class Recorded(NamedTuple):
    """One `function[grid](*arguments, **options)`."""

    function: JITFunction
    grid: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def by_name(self) -> dict[str, Any]:
        """Arguments and options by name."""
        return dict(zip(self.function.arg_names, self.arguments)) | self.options

    @property
    def plan(self) -> dict[str, int]:
        """The tile and the warps: integers among the compile-time arguments, and the number of warps."""
        constants = {self.function.arg_names[i] for i in self.function.constexprs}
        tile = {name: value for name, value in self.by_name.items() if name in constants and type(value) is int}
        return tile | {"warps": self.by_name.get("num_warps", 4)}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values in nested tuples, by the kernel's name for them: x, or x[1] for the second of a tuple."""
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _leaves(f"{name}[{i}]", item)
    else:
        yield name, value


@contextmanager
def record_launches() -> Iterator[list[Recorded]]:
    """Lists the kernels launched in the block instead of running them; tensors may be on the CPU.

    Raises:
        RuntimeError: kernels are interpreted here, not compiled.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("codegen compiles kernels, which it cannot in a process started with TRITON_INTERPRET=1: unset it")
    launches: list[Recorded] = []

    def record(function: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Recorded(function, grid, arguments, options))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


@contextmanager
def absent_gpu(target: str) -> Iterator[None]:
    """Makes Triton compile for a GPU that is not there, one of TARGETS."""
    gpu = TARGETS[target]
    # what Triton's JIT asks before it compiles; the device is the key under which it keeps what it compiled
    driver.set_active(SimpleNamespace(get_current_device=lambda: gpu, get_current_stream=lambda device: 0, get_current_target=lambda: gpu))
    try:
        yield
    finally:
        driver.set_active(None)  # Triton finds the real one when it is next needed


def compile_launches(launches: Iterable[Recorded], target: str) -> list["Code"]:
    """Compiles each launch for the target, one of TARGETS."""

    def compile_one(launch: Recorded) -> Code:
        kernel = launch.function.warmup(*launch.arguments, grid=launch.grid, **launch.options)
        nvidia = TARGETS[target].backend == "cuda"
        registers, stack, accesses, products = (_nvidia if nvidia else _amd)(kernel)
        loads, stores = (dict(Counter(bits for kind, bits in accesses if kind == wanted)) for wanted in ("load", "store"))
        widths = _widths(kernel) if nvidia else {}
        return Code(int(registers), int(stack), kernel.metadata.shared, loads, stores, dict(Counter(products)), widths)

    with absent_gpu(target), ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, launches))


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


Machine = tuple[str, str, list[tuple[str, int]], list[str]]  # registers, bytes of stack, loads and stores in bits, tensor-core instructions


def _nvidia(kernel: Any) -> Machine:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources, sass = (
            subprocess.run([knobs.nvidia.cuobjdump.path, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", resources)
    found = re.findall(r"\s(LDG|LDGSTS|STG)((?:\.\w+)*) ", sass)
    sizes = [(name, re.search(r"\.[US]?(8|16|64|128|256)\b", modifiers)) for name, modifiers in found]
    accesses = [("store" if name == "STG" else "load", int(bits[1]) if bits else 32) for name, bits in sizes]
    return registers, stack, accesses, re.findall(r"\s(\w+MMA)\b", sass)


def _amd(kernel: Any) -> Machine:
    text = kernel.asm["amdgcn"]
    bits = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}
    found = re.findall(r"\b(?:global|buffer|flat)_(load|store)_[us]?(dword(?:x\d)?|short|byte)", text)
    accesses = [(kind, bits[size]) for kind, size in found]
    registers, scratch = (re.findall(rf"\.{key}:\s+(\d+)", text)[0] for key in ("vgpr_count", "private_segment_fixed_size"))
    return registers, scratch, accesses, re.findall(r"\b(v_mfma)_", text)


def _widths(kernel: Any) -> dict[str, int]:
    """The narrowest global access through each pointer argument, in bits, from the PTX.

    Addresses are followed from the pointer parameters through the instructions that make them; an address that was loaded has none.
    """
    # PTX parameters are the arguments that are left when tuples are opened and constants taken out
    leaves = [leaf for name, kind in kernel.src.signature.items() for leaf in _leaves(name, kind) if leaf[1] != "constexpr"]
    origins = {f"param_{i}": {name} for i, (name, kind) in enumerate(leaves) if kind.startswith("*")}
    widths: dict[str, int] = {}
    for line in kernel.asm["ptx"].splitlines():
        if wide := re.search(r"(?:ld|st)\.global\S*?(?:\.v(\d))?\.[busf](\d+)\s.*\[\s*(%rd\d+)", line):
            address, bits = wide[3], int(wide[1] or 1) * int(wide[2])
        elif copy := re.search(r"cp\.async\S*\s+\[.*?\],\s*\[\s*(%rd\d+).*?\],\s*0x(\w+)", line):
            address, bits = copy[1], int(copy[2], 16) * 8
        else:
            if made := re.search(r"(%rd\d+),\s*(.*);", line):
                sources = re.findall(r"%rd\d+|param_\d+", made[2])
                origins.setdefault(made[1], set()).update(*(origins.get(source, ()) for source in sources))
            continue
        for name in origins.get(address, ()):
            widths[name] = min(bits, widths.get(name, bits))
    return widths


def find_problems(launch: Recorded, code: Code, target: str, wide: tuple[int, int] = (0, 0)) -> list[str]:
    """Finds spills, too much shared memory, and rows accessed in smaller pieces than they allow.

    Args:
        launch: the launch that was compiled.
        code: its compiled code.
        target: one of TARGETS.
        wide: how many 128-bit loads and stores there must be.
    """
    found = []
    if "enable_fp_fusion" not in launch.options:
        found.append("does not state enable_fp_fusion, whose default differs between releases")
    if code.spilled > SPILL_LIMIT:
        found.append(f"spills {code.spilled} bytes a thread")
    if code.shared > SHARED_LIMIT[target]:
        found.append(f"needs {code.shared:,} bytes of shared memory, {SHARED_LIMIT[target]:,} are there")
    for name, x in [leaf for argument in launch.by_name.items() for leaf in _leaves(*argument)]:
        if name in code.widths and x.dim() > 1 and x.is_floating_point() and code.widths[name] < _row_width(x):
            found.append(f"{name} is accessed {code.widths[name]} bits at a time, its rows allow {_row_width(x)}")
    for kind, counted, least in (("loads", code.loads, wide[0]), ("stores", code.stores, wide[1])):
        if counted.get(128, 0) < least:
            found.append(f"has {counted.get(128, 0)} {kind} of 128 bits, a whole block needs {least}")
    return found


def _row_width(rows: Tensor) -> int:
    """The widest access in bits, at most 128, that address, length and stride of the rows allow."""
    size = rows.element_size()
    return 8 * math.gcd(16, rows.data_ptr(), rows.shape[-1] * size, rows.stride(-2) * size)

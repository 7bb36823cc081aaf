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

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors among the arguments, by the kernel's name for them: x, or x[1] for the second of a tuple."""
        for name, value in self.by_name.items():
            yield from ((path, leaf) for path, leaf in _leaves(name, value) if isinstance(leaf, Tensor))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _leaves(f"{name}[{i}]", item)
    else:
        yield name, value


def check_compiles() -> None:
    """Raises RuntimeError where this process interprets kernels."""
    if knobs.runtime.interpret:
        raise RuntimeError("codegen compiles kernels, which it cannot in a process started with TRITON_INTERPRET=1: unset it")


@contextmanager
def record_launches() -> Iterator[list[Recorded]]:
    """Lists the kernels launched in the block instead of running them; tensors may be on the CPU.

    Raises:
        RuntimeError: kernels are interpreted here, not compiled.
    """
    check_compiles()
    launches: list[Recorded] = []

    def record(function: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Recorded(function, grid, arguments, options))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


class _AbsentDriver:
    """A driver for a GPU that is not there; it answers what Triton's JIT asks before it compiles."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_device(self) -> GPUTarget:
        return self.target  # the key under which the JIT keeps what it compiled

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_launches(launches: Iterable[Recorded], target: str) -> list["Code"]:
    """Compiles each launch for the target, one of TARGETS."""

    def compile_one(launch: Recorded) -> Code:
        kernel = launch.function.warmup(*launch.arguments, grid=launch.grid, **launch.options)
        return _nvidia(kernel) if TARGETS[target].backend == "cuda" else _amd(kernel)

    driver.set_active(_AbsentDriver(TARGETS[target]))
    try:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(compile_one, launches))
    finally:
        driver.set_active(None)  # Triton finds the real one when it is next needed


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
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", resources)
    accesses: dict[str, Counter[int]] = {"LDG": Counter(), "STG": Counter()}
    for name, modifiers in re.findall(r"\s(LDG|LDGSTS|STG)((?:\.\w+)*) ", sass):
        bits = re.search(r"\.[US]?(8|16|64|128|256)\b", modifiers)
        accesses[name[:3]][int(bits[1]) if bits else 32] += 1
    products = Counter(re.findall(r"\s(\w+MMA)\b", sass))
    loads, stores = dict(accesses["LDG"]), dict(accesses["STG"])
    return Code(int(registers), int(stack), kernel.metadata.shared, loads, stores, dict(products), _widths(kernel))


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run([knobs.nvidia.cuobjdump.path, option, path], check=True, capture_output=True, text=True).stdout


def _amd(kernel: Any) -> Code:
    text = kernel.asm["amdgcn"]
    bits = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}
    accesses: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    for kind, size in re.findall(r"\b(?:global|buffer|flat)_(load|store)_[us]?(dword(?:x\d)?|short|byte)", text):
        accesses[kind][bits[size]] += 1
    registers, scratch = (int(re.findall(rf"\.{key}:\s+(\d+)", text)[0]) for key in ("vgpr_count", "private_segment_fixed_size"))
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
    seen: set[str] = set()
    todo = {register}
    while todo:
        seen |= todo
        todo = {source for r in todo for source in made_from.get(r, ())} - seen
    origins = seen & pointers.keys()
    if len(origins) > 1:
        raise ValueError(f"the address in {register} starts from several parameters: {', '.join(sorted(origins))}")
    return next(iter(origins), None)


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
    for name, tensor in launch.tensors():
        if tensor.dim() > 1 and tensor.is_floating_point() and name in code.widths and code.widths[name] < _row_width(tensor):
            found.append(f"{name} is accessed {code.widths[name]} bits at a time, its rows allow {_row_width(tensor)}")
    for kind, counted, least in (("loads", code.loads, wide[0]), ("stores", code.stores, wide[1])):
        if counted.get(128, 0) < least:
            found.append(f"has {counted.get(128, 0)} {kind} of 128 bits, a whole block needs {least}")
    return found


def _row_width(rows: Tensor) -> int:
    """The widest access in bits, at most 128, that address, length and stride of the rows allow."""
    size = rows.element_size()
    return 8 * math.gcd(16, rows.data_ptr(), rows.shape[-1] * size, rows.stride(-2) * size)

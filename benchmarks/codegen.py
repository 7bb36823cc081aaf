"""The machine code of every kernel and launch plan, without a GPU: kdfast bench codegen

The table shows registers, spills, shared memory, the width of loads and stores, tensor-core instructions, and the bytes that a kernel
asks for beside the least any could. binaries.py says how a launch is compiled; each operator's module lists its launches.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import triton

from kdfast import files, machine
from kdfast.benchmarks.binaries import Recorded, compile_launches, find_problems, record_launches
from kdfast.benchmarks.harness import Launch
from kdfast.benchmarks.operators import OPERATORS
from kdfast.engine.ranges import Checked
from kdfast.text import markdown_table


@dataclass(frozen=True)
class Codegen(Checked):
    """Registers, spills, shared memory, load widths and bytes moved of every kernel and launch plan; needs no GPU."""

    targets: tuple[Literal["sm_80", "sm_90", "sm_100", "gfx942"], ...] = ("sm_80", "sm_90", "sm_100", "gfx942")
    """Architectures to compile for."""
    out: Path | None = None
    """Also write the numbers, with machine and versions, to this JSON file."""


def record(launches: Sequence[Launch]) -> list[Recorded]:
    """Records each launch; launches of one call share its recording."""
    recordings: dict[Callable[[], Any], list[Recorded]] = {}
    for launch in launches:
        if launch.call not in recordings:
            with record_launches() as recordings[launch.call]:
                launch.call()
    return [next(made for made in recordings[x.call] if x.function in (None, made.function.__name__)) for x in launches]


def measure(launches: Sequence[Launch], target: str) -> list[dict[str, Any]]:
    """Compiles each launch and returns its resources, the bytes it moves and its problems, one entry per launch."""
    recorded = record(launches)
    return [
        {
            **{name: getattr(launch, name) for name in ("kernel", "N", "C", "dtypes", "variant")},
            "function": made.function.__name__,
            "plan": made.plan,
            "target": target,
            **code._asdict(),
            "bytes_moved": launch.moved,
            "bytes_floor": launch.floor,
            "problems": find_problems(made, code, target, launch.wide),
        }
        for launch, made, code in zip(launches, recorded, compile_launches(recorded, target), strict=True)
    ]


def run(options: Codegen) -> list[dict[str, Any]]:
    """Compiles, prints the table, and writes options.out where asked to.

    Returns:
        One entry per launch and target, see measure().

    Raises:
        RuntimeError: this process interprets kernels.
    """
    if options.out is not None:
        files.check_writable(options.out, "--out")
    entries = []
    for target in options.targets:
        entries += measure([launch for operator in OPERATORS.values() for launch in operator.module.launches(target)], target)
    print(make_table(entries))
    wrong = [entry for entry in entries if entry["problems"]]
    for entry in wrong:
        print(f"{entry['target']}, C {_describe(entry)}: {'; '.join(entry['problems'])}")
    print(f"Triton {triton.__version__}: {len(entries)} kernels compiled, {len(wrong)} with a problem")
    if options.out is not None:
        files.write_json(options.out, machine.document(entries, triton=triton.__version__))
    return entries


def make_table(entries: Iterable[dict[str, Any]]) -> str:
    """A row per launch and target. Loads and stores are instructions by width in bits; moved are bytes, or operations (see Launch)."""
    columns = ("target", "kernel", "case", "plan", "registers", "spills", "shared", "loads", "stores", "tensor cores", "moved / floor")
    rows = [
        (
            entry["target"],
            entry["kernel"] + entry["function"],
            _describe(entry),
            " ".join(f"{name.lower()} {value}" for name, value in entry["plan"].items()),
            *(str(entry[name]) for name in ("registers", "spilled", "shared")),
            *(_format_counts(entry[name]) for name in ("loads", "stores", "products")),
            f"{entry['bytes_moved'] / entry['bytes_floor']:.2f}",
        )
        for entry in entries
    ]
    return markdown_table(columns, rows, left=(0, 1, 2, 3))


def _describe(entry: dict[str, Any]) -> str:
    return f"{entry['C']} {entry['dtypes']}, {entry['variant']}"


def _format_counts(instructions: dict[Any, int]) -> str:
    return " ".join(f"{count}x{kind}" for kind, count in sorted(instructions.items(), reverse=True))

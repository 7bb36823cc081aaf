"""The checks that gpu.py runs on the device, one line of JSON per result: python -m kdfast.benchmarks.maintain.checks NAME

    compile    runs ours once in every case that `times` and `calls` measure and in every small call, so that its kernels are compiled
    times      device time of ours alone, in bfloat16 and float32, on data larger than the cache, as a share of the floor
    calls      call time of ours in eager mode, in the small cases
    once       one call of ours in the largest case of every operator, for a profiler to watch
    sanitize   every small call and the hostile ones, without results, for compute-sanitizer to watch
    loaders    images a second of every loader, and the share of a ResNet-18's training that waits for them (loaders.py)
    training   a ConKD step, ResNet-101 to ResNet-18, uncompiled (training.py)
    benchmarks every operator against its peers, in float32 and bfloat16 (harness.py)

TRITON_INTERPRET=1 runs `sanitize` on the CPU.
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context

import torch

from kdfast import backend, machine
from kdfast.benchmarks import harness, loaders, operators, timing, training
from kdfast.benchmarks.harness import OURS, Case, dtype_name
from kdfast.benchmarks.operators import OPERATORS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDS = 10


def report(**result: object) -> None:
    """Prints one result as a line of JSON."""
    print(json.dumps(result), flush=True)


def timed_cases(device: torch.device) -> list[Case]:
    """The usual cases of every operator in bfloat16 and float32, the largest first."""
    cases = operators.cases(device, torch.bfloat16) + operators.cases(device, torch.float32)
    return sorted(cases, key=lambda case: -case.bytes)


def compile_kernels(device: torch.device) -> None:
    """Runs all cases and small calls once, in a process a core."""
    parts = min(12, machine.cores())
    with ProcessPoolExecutor(parts, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile_part, repeat(device), range(parts), repeat(parts)))


def _compile_part(device: torch.device, part: int, parts: int) -> None:
    calls = [call for operator in OPERATORS.values() for dtype in DTYPES for call in operator.module.calls(device, dtype)]
    with backend("triton"):
        for case in timed_cases(device)[part::parts]:
            case.step(OURS).run()
        for call in calls[part::parts]:
            call.step(*call.inputs(0)).run()


def time_device(device: torch.device) -> None:
    """Times ours alone on the device, calls going round sets of buffers that exceed the cache."""
    for case in timed_cases(device):
        times = harness.time_on_device(case, case.variants[OURS], ROUNDS)
        if "device_ms" in times:
            times["floor_share"] = 1e3 * harness.floor_seconds(case) / times["device_ms"]
        report(operator=case.operator, case=case.name, dtype=dtype_name(case.dtype), **times)


def time_calls(device: torch.device) -> None:
    """Times eager calls of ours in the quick cases."""
    for case in timed_cases(device):
        if case.tier == "quick":
            (seconds,) = timing.in_turn({OURS: case.step(OURS).run}, rounds=ROUNDS, device=device).values()
            report(operator=case.operator, case=case.name, dtype=dtype_name(case.dtype), call_ms=1e3 * min(seconds))


def run_once(device: torch.device) -> None:
    """Runs the largest bfloat16 case of every operator once."""
    for name in OPERATORS:
        max(operators.cases(device, torch.bfloat16, operators=[name]), key=lambda case: case.bytes).step(OURS).run()


def run_for_sanitizer(device: torch.device) -> None:
    """Runs every small call and the hostile ones."""
    with backend("triton"):
        for name, operator in OPERATORS.items():
            calls = [call for dtype in DTYPES for call in operator.module.calls(device, dtype)]
            for call in calls:
                call.step(*call.inputs(0)).run()
            getattr(operator.module, "hostile_calls", lambda device: None)(device)
            report(operator=name, runs=len(calls))


def measure_loaders(device: torch.device) -> None:
    """Runs kdfast bench loaders on generated images."""
    for case in loaders.run(loaders.Loaders(images=2000, epochs=3, batch_size=128, device=str(device))):
        report(**case)


def measure_training(device: torch.device) -> None:
    """Runs kdfast bench train."""
    report(**training.run(training.Train(compile="off", seconds=15, device=str(device))))


def measure_benchmarks(device: torch.device) -> None:
    """Measures the usual cases with all their peers, the quick ones first."""
    for case in operators.cases(device, torch.float32) + operators.cases(device, torch.bfloat16):
        report(**harness.measure(case, rounds=ROUNDS))


CHECKS = {
    "compile": compile_kernels,
    "times": time_device,
    "calls": time_calls,
    "once": run_once,
    "sanitize": run_for_sanitizer,
    "loaders": measure_loaders,
    "training": measure_training,
    "benchmarks": measure_benchmarks,
}


def main() -> None:
    """Runs the named one of CHECKS on the GPU, or on the CPU where there is none."""
    (name,) = sys.argv[1:]
    torch.manual_seed(0)
    CHECKS[name](torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

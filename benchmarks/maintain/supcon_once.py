"""One training step of supcon_loss at a size where one N x N matrix is larger than the memory.

    python -m kdfast.benchmarks.maintain.supcon_once [--N 131072 ...] [--dtypes float32 bfloat16]

A step takes minutes on a CPU. The result is results/cpu-supcon_once.json: for ours, and for the original where it fits, the seconds of
the step, the seconds of the processor (of all threads, without what else the machine does) and the most bytes live at once beyond the
inputs. The tests hold the same code to the reference at sizes that the reference can run.
"""

import itertools
import os
import time
from typing import Any, Literal

import torch
import tyro

from kdfast.benchmarks.harness import EAGER, OURS, Step, dtype_name
from kdfast.benchmarks.maintain import write_results
from kdfast.benchmarks.supcon import case
from kdfast.benchmarks.timing import peak_memory

MATRICES = 7  # N x N in float32, that the original has at once


def measure(N: int, D: int, dtype: torch.dtype) -> dict[str, Any]:
    """One training step on the CPU, ours and the original."""
    measured: dict[str, Any] = {"N": N, "D": D, "dtype": dtype_name(dtype), "operations": 6 * N**2 * D}
    needed, memory = MATRICES * 4 * N**2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in (OURS, EAGER):
        if name == EAGER and needed > memory:  # the allocation might succeed, and the process be killed
            measured[name] = {"skipped": f"out of memory: needs {needed / 1e9:.0f} GB, the machine has {memory / 1e9:.0f} GB"}
        else:
            _measure_step(case(1024, D, dtype).step(name))  # warms up
            measured[name] = _measure_step(case(N, D, dtype).step(name))
    return measured


def _measure_step(step: Step) -> dict[str, float]:
    seconds = {}

    def run() -> None:
        wall, processor = time.perf_counter(), time.process_time()
        results = step.run()
        seconds["seconds"] = round(time.perf_counter() - wall, 2)
        seconds["processor_seconds"] = round(time.process_time() - processor, 2)
        if not all(x.isfinite().all() for x in results):
            raise AssertionError("value or gradient is not finite")

    return {"memory": peak_memory(run), **seconds}


def main(
    N: tuple[int, ...] = (131072,), D: int = 128, dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
) -> None:
    """Prints a line per size and writes the result.

    Args:
        N: numbers of rows.
        D: features.
        dtypes: of the features.
    """
    cases = []
    for size, dtype in itertools.product(N, dtypes):
        cases.append(measure(size, D, getattr(torch, dtype)))
        print(cases[-1], flush=True)
    print(write_results("cpu-supcon_once", cases))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)

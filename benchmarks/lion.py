"""The Lion step on the CPU against lion-pytorch's two forms and AdamW: python -m kdfast.benchmarks.lion

Floor: five passes over memory (read p, g, m; write p, m), 20 bytes a float32 parameter, at the speed of a large copy_ measured
here. Cases: the parameters of ResNet-18 and ResNet-101, the latter's many small tensors included, and one tensor of 256 MB.
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import lion_pytorch
import torch
import torchvision
from kdfast.benchmarks import timing
from lion_pytorch.foreach import Lion as ForeachLion
from torch import Tensor

from kdfast.optim import Lion

PEERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "lion_pytorch": lambda params: lion_pytorch.Lion(params, lr=1e-4, weight_decay=0.1),
    "lion_pytorch.foreach": lambda params: ForeachLion(params, lr=1e-4, weight_decay=0.1),
    "torch AdamW(foreach)": lambda params: torch.optim.AdamW(params, lr=1e-4, weight_decay=0.1, foreach=True),
    "kdfast Lion(foreach=False)": lambda params: Lion(params, lr=1e-4, weight_decay=0.1, foreach=False),
}


def shapes(case: str) -> list[torch.Size]:
    """The parameter shapes of a torchvision network, or of one tensor of 256 MB."""
    if case == "256 MB":
        return [torch.Size([64 * 2**20])]
    with torch.device("meta"):
        return [p.shape for p in getattr(torchvision.models, case)().parameters()]


def parameters(sizes: list[torch.Size]) -> list[Tensor]:
    """Random parameters with random gradients."""
    params = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def copy_bandwidth(elements: int = 32 * 2**20) -> float:
    """Bytes a second that copy_ reads and writes, best of ten."""
    source, target = torch.randn(elements), torch.empty(elements)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 8 * elements / min(seconds)


def measure(case: str, peer: str, pairs: int) -> dict[str, Any]:
    """Both optimizers step the same shapes in turn."""
    sizes = shapes(case)
    ours, theirs = Lion(parameters(sizes), lr=1e-4, weight_decay=0.1), PEERS[peer](parameters(sizes))
    bandwidths = [copy_bandwidth()]
    result = timing.interleaved(ours.step, theirs.step, pairs=pairs)
    bandwidths.append(copy_bandwidth())
    moved = 20 * sum(size.numel() for size in sizes)
    floor_ms = 1e3 * moved / statistics.mean(bandwidths)
    return {
        "case": case,
        "peer": peer,
        "tensors": len(sizes),
        "bytes": moved,
        "copy_GB_s": statistics.mean(bandwidths) / 1e9,
        "floor_ms": floor_ms,
        **result,
        "ours_over_floor": result["ours_ms"] / floor_ms,
        "theirs_over_floor": result["theirs_ms"] / floor_ms,
    }


def main(pairs: int = 20) -> None:
    """Measures every case, prints a table and writes results/cpu-lion.json."""
    cases = []
    for case in ("resnet18", "resnet101", "256 MB"):
        for peer in PEERS:
            gc.collect()
            cases.append(measure(case, peer, pairs))
            print(
                "{case:10} {peer:28} ours {ours_ms:7.1f} ms ({ours_over_floor:.2f} x floor)  theirs {theirs_ms:7.1f} ms "
                "({theirs_over_floor:.2f} x floor)  speed-up {speedup:.2f}".format(**cases[-1]),
                flush=True,
            )
    print(timing.write_json("cpu-lion", cases))


if __name__ == "__main__":
    main()

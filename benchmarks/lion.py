"""The Lion step for the harness: the parameters of ResNets, their many small tensors included, of a ViT, of LeNet-5, and single tensors.

Its value is the momentum after the first step, its gradient what the step did to the parameters.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor

from kdfast import reference
from kdfast.benchmarks.harness import COMPILED, EAGER, OURS, Case, Step, Variant
from kdfast.benchmarks.timing import CPU
from kdfast.optim import Lion

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}  # a rate at which the step stands out from rounding
PARAMETERS = {
    "cpu": {"quick": ["16 MB", "LeNet-5"], "usual": ["4 KB", "1 MB", "ResNet-18", "256 MB"], "long": ["ResNet-101", "ViT-B/16"]},
    "cuda": {"quick": ["ResNet-18"], "usual": ["ResNet-101", "ViT-B/16", "1024 MB"]},
}
LENET = ((6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,), (120, 400), (120,), (84, 120), (84,), (10, 84), (10,))  # calls, and hardly any work
NETWORKS = {"ResNet-18": "resnet18", "ResNet-101": "resnet101", "ViT-B/16": "vit_b_16"}  # torchvision's names


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Every set of parameters."""
    for tier, names in PARAMETERS[device.type].items():
        for name in names:
            yield case(name, shapes(name), dtype, device, tier)


def shapes(name: str) -> list[torch.Size]:
    """The parameter shapes of LeNet-5 or a torchvision network, or of one tensor that in float32 has so many KB or MB."""
    if name == "LeNet-5":
        return [torch.Size(size) for size in LENET]
    if name.endswith((" KB", " MB")):
        number, unit = name.split()
        return [torch.Size([int(number) * {"KB": 2**8, "MB": 2**18}[unit]])]
    with torch.device("meta"):
        return [p.shape for p in getattr(torchvision.models, NETWORKS[name])().parameters()]


def case(name: str, sizes: list[torch.Size], dtype: torch.dtype = torch.float32, device: torch.device = CPU, tier: Any = "usual") -> Case:
    """Steps of parameters of these sizes."""

    def inputs(seed: int) -> tuple[list[Tensor], list[Tensor]]:
        random = torch.Generator(device).manual_seed(seed)
        params, grads = ([torch.randn(size, generator=random, device=device).to(dtype) for size in sizes] for _ in range(2))
        return [0.02 * p for p in params], grads

    def exact(params: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        p, g = _flat(params).double(), _flat(grads).double()
        after, momentum = reference.lion_step(p, g, torch.zeros_like(p), **OPTIONS)
        return momentum, after - p

    elements = sum(size.numel() for size in sizes)
    return Case(
        operator="Lion",
        name=f"{name}, {len(sizes)} tensors" if len(sizes) > 1 else f"one tensor of {elements:,}",
        shape={"tensors": len(sizes), "N": elements},
        dtype=dtype,
        device=device,
        bytes=5 * elements * dtype.itemsize,  # parameter, gradient and momentum are read, parameter and momentum written
        operations=10 * elements,  # decay 1, interpolation 3, sign 1, update 2, momentum 3
        inputs=inputs,
        exact=exact,
        variants=_variants(device),
        tier=tier,
    )


def _variants(device: torch.device) -> dict[str, Variant]:
    def of(make: Callable[[list[Tensor]], torch.optim.Optimizer], compile: bool = False) -> Callable[..., Step]:
        return lambda params, grads: _step(make, params, grads, compile)

    def original() -> Callable[..., Any]:
        from lion_pytorch import Lion

        return lambda params: Lion(params, **OPTIONS)

    def original_foreach() -> Callable[..., Any]:
        from lion_pytorch.foreach import Lion

        return lambda params: Lion(params, **OPTIONS)

    def original_triton() -> Callable[..., Any]:
        importlib.import_module("triton")  # lion_pytorch.triton ends the process where there is none
        from lion_pytorch import Lion

        # it autotunes for every number of elements in the first step and restores what that wrote: Step.results is its warm-up
        return lambda params: Lion(params, **OPTIONS, use_triton=True)

    def optimi() -> Callable[..., Any]:
        from optimi import Lion

        return lambda params: Lion(params, **OPTIONS, kahan_sum=False)  # what it does to 16-bit parameters unasked, and no other does

    def timm() -> Callable[..., Any]:
        from timm.optim import Lion

        return lambda params: Lion(params, **OPTIONS)

    def bitsandbytes() -> Callable[..., Any]:
        from bitsandbytes.optim import Lion32bit

        return lambda params: Lion32bit(params, **OPTIONS)

    capturable = device.type == "cuda"
    return {
        EAGER: Variant(lambda: of(original())),
        COMPILED: Variant(lambda: of(original(), compile=True)),
        "lion-pytorch foreach": Variant(lambda: of(original_foreach())),
        "lion-pytorch Triton": Variant(lambda: of(original_triton()), gpu=True),
        "torch-optimi": Variant(lambda: of(optimi())),
        "timm": Variant(lambda: of(timm())),
        "bitsandbytes": Variant(lambda: of(bitsandbytes()), synchronizes=True),
        "AdamW (fused)": Variant(
            lambda: of(lambda params: torch.optim.AdamW(params, **OPTIONS, fused=True, capturable=capturable)), other=True
        ),
        OURS: Variant(lambda: of(lambda params: Lion(params, **OPTIONS, capturable=capturable))),
    }


def _step(make: Callable[[list[Tensor]], torch.optim.Optimizer], params: list[Tensor], grads: list[Tensor], compile: bool) -> Step:
    params = [torch.nn.Parameter(p.clone()) for p in params]
    for p, g in zip(params, grads):
        p.grad = g.clone()  # peers have been seen to use it as scratch
    optimizer = make(params)
    run = torch.compile(optimizer.step) if compile else optimizer.step

    def results() -> tuple[Tensor, Tensor]:
        before = _flat(params)
        run()
        momenta = [next(s for s in optimizer.state[p].values() if isinstance(s, Tensor) and s.shape == p.shape) for p in params]
        return _flat(momenta), _flat(params).double() - before

    return Step(run, results)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])

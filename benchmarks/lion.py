"""The Lion step: the parameters of ResNets with their many small tensors, of a ViT, of LeNet-5, and single tensors.

Its value is the momentum after the first step, its gradient the change of the parameters.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, get_args
from unittest import mock

import torch
import torchvision
from torch import Tensor

from kdfast import reference
from kdfast.benchmarks.harness import COMPILED, EAGER, OURS, Call, Case, Launch, Step, Variant, short_names
from kdfast.benchmarks.timing import CPU
from kdfast.ops.lion.int8 import count_scales
from kdfast.ops.lion.rows import Options, Rounding, Row
from kdfast.optim import Lion

OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}  # a rate at which the step stands out from rounding
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
        exact=_exact,
        variants=_variants(device),
        tier=tier,
    )


def _variants(device: torch.device) -> dict[str, Variant]:
    def peer(name: str, *, compile: bool = False, **options: Any) -> Callable[[], Callable[..., Step]]:
        def prepare() -> Callable[..., Step]:
            module, _, optimizer = name.rpartition(".")
            make = partial(getattr(importlib.import_module(module), optimizer), **OPTIONS, **options)
            return partial(optimizer_step, make, compile=compile)

        return prepare

    capturable = device.type == "cuda"
    return {
        EAGER: Variant(peer("lion_pytorch.Lion")),
        COMPILED: Variant(peer("lion_pytorch.Lion", compile=True)),
        "lion-pytorch foreach": Variant(peer("lion_pytorch.foreach.Lion")),
        "lion-pytorch Triton": Variant(peer("lion_pytorch.Lion", use_triton=True), gpu=True),  # tunes in its first step: Step.results
        "torch-optimi": Variant(peer("optimi.Lion", kahan_sum=False)),  # no other compensates 16-bit parameters unasked
        "timm": Variant(peer("timm.optim.Lion")),
        "bitsandbytes": Variant(peer("bitsandbytes.optim.Lion32bit"), synchronizes=True),
        "AdamW (fused)": Variant(peer("torch.optim.AdamW", fused=True, capturable=capturable), other=True),
        OURS: Variant(peer("kdfast.optim.Lion", capturable=capturable)),
    }


def optimizer_step(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], params: list[Tensor], grads: list[Tensor], *, compile: bool = False
) -> Step:
    """A Step of an optimizer on copies of parameters and gradients."""
    params = [torch.nn.Parameter(p.clone()) for p in params]
    for p, g in zip(params, grads):
        p.grad = g.clone()  # peers have been seen to use it as scratch
    optimizer = make(params)
    run = torch.compile(optimizer.step) if compile else optimizer.step

    def results() -> tuple[Tensor, Tensor]:
        before = _flat(params).double()
        run()
        momenta = [next(s for s in optimizer.state[p].values() if isinstance(s, Tensor) and s.shape == p.shape) for p in params]
        return _flat(momenta), _flat(params).double() - before

    return Step(run, results)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


# ---- small calls -----------------------------------------------------------------------------------------------------


def calls(device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
    """Whole blocks and parts, aligned and unaligned tensors, every rounding and momentum; rounding at random has nothing exact."""
    yield _call("plain", dtype, device, exact=dtype == torch.float32)
    yield _call("lr on the device", dtype, device, exact=dtype == torch.float32, lr=torch.full((), OPTIONS["lr"], device=device))
    yield _call("cautious, clipped", dtype, device, launches=None, cautious=True, max_grad_norm=1.0)
    yield _call("int8 momentum", dtype, device, momentum_dtype=torch.int8)
    if dtype != torch.float32:
        yield _call(
            "stochastic, cautious, int8 momentum", dtype, device, None, momentum_dtype=torch.int8, rounding="stochastic", cautious=True
        )
        yield _call("kahan", dtype, device, rounding="kahan")
        yield _call("stochastic, float32 momentum", dtype, device, momentum_dtype=torch.float32, rounding="stochastic")


def _call(name: str, dtype: torch.dtype, device: torch.device, launches: int | None = 1, *, exact: bool = False, **options: Any) -> Call:
    sizes = (3, 2048, 5001, 4096)

    def inputs(seed: int) -> tuple[list[Tensor], list[Tensor]]:
        random = torch.Generator(device).manual_seed(seed)
        params, grads = ([torch.randn(n + 1, generator=random, device=device).to(dtype) for n in sizes] for _ in range(2))
        return [p[i % 2 :] for i, p in enumerate(params)], [g[i % 2 :] for i, g in enumerate(grads)]

    make = partial(Lion, **(OPTIONS | options))
    return Call(name, inputs, partial(optimizer_step, make), _exact if exact else None, launches)


def _exact(params: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    p, g = _flat(params).double(), _flat(grads).double()
    after, momentum = reference.lion_step(p, g, torch.zeros_like(p), **OPTIONS)
    return momentum, after - p


# ---- launches whose machine code is read -----------------------------------------------------------------------------


ELEMENTS = 100_003  # of the tensor: whole blocks, and a last one that is not


def launches(target: str) -> Iterator[Launch]:
    """Every combination of dtypes that training has, with every rounding."""
    fp32, bf16, fp16, int8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
    for dtypes in ((fp32, fp32, fp32), (fp32, fp32, bf16), (fp32, bf16, fp32), (fp32, fp32, int8)):
        for request in ("plain", "scaled", "cautious"):
            yield from step_launches(target, request, *dtypes)
    for dtypes in ((bf16, bf16, bf16), (bf16, bf16, fp32), (bf16, fp32, fp32), (bf16, bf16, int8), (fp16, fp16, fp16), (fp16, fp16, fp32)):
        for request in ("plain", "stochastic", "kahan", "kahan, cautious, scaled"):
            yield from step_launches(target, request, *dtypes)


def step_launches(target: str, request: str, param: torch.dtype, grad: torch.dtype, momentum: torch.dtype) -> Iterator[Launch]:
    """The step, and the count that a cautious step makes first. The words of the request are its options.

    scaled: by a loss scale or clipping, with a rate on the device.
    """
    from kdfast.benchmarks.binaries import TARGETS
    from kdfast.kernels import lion as kernel

    words = request.split(", ")
    rounding: Rounding = next((word for word in get_args(Rounding) if word in words), "nearest")
    cautious, one = "cautious" in words, torch.ones(()) if "scaled" in words else None

    def call() -> None:
        p, g, m = (torch.zeros(ELEMENTS, dtype=dtype) for dtype in (param, grad, momentum))
        row = Row(p, g, m, torch.zeros(count_scales(ELEMENTS)), torch.zeros_like(p), torch.zeros(()))
        options = Options(1e-4 if one is None else one, 0.9, 0.99, 0.1, rounding=rounding, cautious=cautious)
        warps = kernel.count_warps(TARGETS[target].warp_size)
        with mock.patch.object(kernel, "WARPS", warps), mock.patch.object(Options, "lr_on", lambda options, _: options.lr):
            kernel.step(kernel.make_table([row]), options, one, one)

    def size(dtypes: Sequence[torch.dtype]) -> int:
        return sum(ELEMENTS * dtype.itemsize for dtype in dtypes)

    def wide(dtypes: Sequence[torch.dtype]) -> int:
        """Accesses of 128 bits by a thread of a whole block; 8 elements of int8 are fewer bits."""
        return sum(kernel.ELEMENTS_A_THREAD * dtype.itemsize // 16 for dtype in dtypes)

    counted, compensated = (grad, momentum), [param] * (rounding == "kahan")
    loaded, stored = (param, grad, momentum, *compensated), (param, momentum, *compensated)
    names = "/".join(short_names(dtype) for dtype in (param, grad, momentum))
    if cautious:
        yield Launch("lion", 1, ELEMENTS, names, request, call, size(counted), size(counted), "_count_moving", (wide(counted), 0))
    moved = size(loaded) + size(stored)
    yield Launch("lion", 1, ELEMENTS, names, request, call, moved, moved, "_step", (wide(loaded), wide(stored)))

"""A small run of every Triton kernel in every regime, for compute-sanitizer to watch:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m kdfast.benchmarks.maintain.sanitize

Without PyTorch's cache of memory every tensor is an allocation of its own, so that a read beyond its end is seen. Sizes are odd, rows
few; what is computed is the tests' business. TRITON_INTERPRET=1 runs it on the CPU.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kdfast import backend
from kdfast.functional import attention_transfer_loss, crd_loss, kd_loss, supcon_loss
from kdfast.optim import Lion


def distill_kl(device: torch.device) -> int:
    """Logit distillation: several rows a program, one row in registers, a loop over the row, with few and with many tensors."""
    runs = 0

    def run(N: int, C: int, *, learn: bool, dtype: torch.dtype = torch.float32, strided: bool = False, **options: Any) -> None:
        nonlocal runs

        def logits(learns: bool) -> Tensor:
            columns = C + 3 if strided else C  # the last row ends where the allocation does
            return torch.randn(N, columns, device=device, dtype=dtype)[:, columns - C :].requires_grad_(learns)

        labels = torch.randint(C, (N,), device=device)
        labels[0], labels[-1] = C + 5, -100  # out of range; ignored
        inputs = [logits(True), logits(learn), logits(learn)]
        loss = kd_loss(inputs[0], inputs[1:], labels if "ce_weight" in options else None, **options)
        torch.autograd.grad(loss, [x for x in inputs if x.requires_grad], torch.full_like(loss, 0.5))
        runs += 1

    for C in (10, 100, 1001, 4096, 8191, 9001, 12000):
        run(5, C, learn=False)
        run(3, C, learn=True, standardize=True, ce_weight=0.1, label_smoothing=0.1)
    for C in (10, 1001, 9001):
        run(5, C, learn=False, dtype=torch.bfloat16, divergence="js", standardize=True)
        run(5, C, learn=False, dtype=torch.float16, divergence="reverse")  # its gradients are made by the backward pass
        run(5, C, learn=False, reduction="none", strided=True, ce_weight=0.1)
    if device.type == "cuda":  # the interpreter would take a minute
        run(1100, 520, learn=False)  # more programs than one adds up at a time
    return runs


def supcon(device: torch.device) -> int:
    """Supervised contrastive loss: rows held and rows walked, names and a mask, other rows, every dtype."""
    runs = 0

    def run(N: int, D: int, *, dtype: torch.dtype = torch.float32, masked: bool = False, others: int = 0, **options: Any) -> None:
        nonlocal runs
        features = torch.randn(N, D, device=device).to(dtype).requires_grad_()
        contrast = torch.randn(others, D, device=device).to(dtype).requires_grad_() if others else None
        labels = None if masked else torch.randint(3, (N,), device=device)
        mask = torch.rand(N, N, device=device) if masked else None
        loss = supcon_loss(features, labels, mask=mask, contrast=contrast, **options)
        torch.autograd.grad(loss, [x for x in (features, contrast) if x is not None])
        runs += 1

    for D in (10, 128, 300):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            run(65, D, dtype=dtype)
            run(67, D, dtype=dtype, others=5, normalize=True, duplicates=2)
        run(65, D, masked=True, others=3, self_positive=True)
    if device.type == "cuda":  # the interpreter would take a minute
        run(4099, 128, dtype=torch.bfloat16)  # large tiles, and the bound from the device
        run(4099, 128, dtype=torch.bfloat16, temperature=0.005)
    return runs


def nce(device: torch.device) -> int:
    """Contrastive representation distillation: rows of every width, many parts and few columns, indices of no row, every dtype."""
    runs = 0

    def run(B: int, n: int, K: int, D: int, dtype: torch.dtype = torch.float32, bank_dtype: torch.dtype = torch.float32) -> None:
        nonlocal runs
        student, teacher = (torch.randn(B, D, device=device).to(dtype).requires_grad_() for _ in range(2))
        banks = [torch.randn(n, D, device=device).to(bank_dtype) for _ in range(2)]
        indices = torch.randint(n, (B, 1 + K), device=device)
        if device.type == "cuda":  # on a CPU they raise
            indices[0, 0], indices[-1, -1] = n, -1
        loss = crd_loss(student, teacher, *banks, indices, temperature=20.0)
        torch.autograd.grad(loss, [student, teacher])
        with torch.no_grad():
            crd_loss(student, teacher, *banks, indices, temperature=20.0)
        runs += 1

    for D in (3, 16, 100, 101, 128, 300, 2050):
        run(3, 37, 70, D)
        run(2, 37, 9, D, torch.bfloat16, torch.bfloat16)
    run(3, 37, 0, 16)
    run(3, 37, 130, 128, torch.float16)
    run(3, 37, 130, 128, torch.float32, torch.bfloat16)
    if device.type == "cuda":  # the interpreter would take a minute
        run(64, 5000, 16384, 128)
        run(3000, 37, 5, 128)  # more losses than a block adds up at a time
    return runs


def lion(device: torch.device) -> int:
    """The Lion step: whole blocks and parts, aligned and not, every rounding and momentum."""
    runs = 0

    def run(dtype: torch.dtype = torch.float32, **options: Any) -> None:
        nonlocal runs
        sizes = (3, 2048, 5001, 4096)
        params = [torch.randn(n + 1, device=device).to(dtype)[i % 2 :].requires_grad_() for i, n in enumerate(sizes)]
        optimizer = Lion(params, weight_decay=0.1, **options)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        runs += 1

    run()
    run(cautious=True, max_grad_norm=1.0, lr=torch.full((), 1e-4, device=device))
    run(momentum_dtype=torch.int8)
    run(torch.bfloat16, momentum_dtype=torch.int8, rounding="stochastic", cautious=True)
    run(torch.bfloat16, rounding="kahan")
    run(torch.float16, rounding="stochastic", momentum_dtype=torch.float32)
    return runs


def attention_map(device: torch.device) -> int:
    """Attention maps: both layouts, parts of larger maps, rows that can and that cannot be read wide, several steps over everything."""
    runs = 0

    def run(*shape: int, dtype: torch.dtype = torch.float32, p: float = 2, more: int = 0, channels_last: bool = False) -> None:
        nonlocal runs
        layout = torch.channels_last if channels_last else torch.contiguous_format

        def maps(C: int) -> Tensor:
            whole = torch.randn(shape[0], more + C, *shape[2:], device=device).to(dtype).to(memory_format=layout)
            return whole[:, more:].requires_grad_()  # the last channel ends where the allocation does

        inputs = [maps(shape[1]), maps(shape[1] + 3)]
        loss = attention_transfer_loss(*inputs, p=p)
        torch.autograd.grad(loss, inputs, torch.full_like(loss, 0.5))
        runs += 1

    for channels_last in (False, True):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            run(3, 17, 9, 7, dtype=dtype, channels_last=channels_last)
            run(2, 64, 8, 8, dtype=dtype, more=8, channels_last=channels_last)
        run(2, 700, 3, 1, p=2.5, channels_last=channels_last)
        run(1, 2, 70, 61, p=1, channels_last=channels_last)
        run(2, 5, 4, 4, p=0.5, more=1, channels_last=channels_last)
    return runs


KERNELS: Mapping[str, Callable[[torch.device], int]] = {  # by file in kernels/
    "distill_kl": distill_kl,
    "supcon": supcon,
    "nce": nce,
    "lion": lion,
    "attention_map": attention_map,
}


def main() -> None:
    """Launches all of them on the current GPU, and prints how often."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with backend("triton"):
        for name, launch in KERNELS.items():
            print(f"{name}: {launch(device)} runs", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

"""Logit distillation, forward and backward.

kd is the loss as RepDistiller writes it, lskd as the authors of logit standardization do; +ce adds F.cross_entropy, which both train
with; js has the Jensen-Shannon divergence in kd's place. Liger's losses start from probabilities: its path is two softmaxes and its kernel.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import reference
from kdfast.benchmarks.harness import TIERS, Call, Case, Launch, Variant, in_float64, loss_call, loss_step, loss_variants, short_names
from kdfast.benchmarks.timing import CPU
from kdfast.functional import kd_loss
from kdfast.ops.distill_kl.options import Divergence, KDOptions, Reduction

LOSSES: dict[str, dict[str, Any]] = {
    "kd": {"temperature": 4.0},
    "lskd": {"temperature": 2.0, "standardize": True},
    "kd+ce": {"temperature": 4.0, "kd_weight": 0.9, "ce_weight": 0.1},
    "lskd+ce": {"temperature": 2.0, "standardize": True, "kd_weight": 9.0, "ce_weight": 0.1},
    "js": {"temperature": 4.0, "divergence": "js"},
}
SHAPES = {
    "cpu": {
        "quick": [(64, 100), (256, 1000)],
        "usual": [(8, 10), (1024, 10), (128, 100), (1024, 1000), (64, 32000)],
        "long": [(64, 131072)],
    },
    "cuda": {
        "quick": [(128, 100), (1024, 1000), (2048, 32000)],
        "usual": [(128, 10), (256, 1000), (8192, 4096), (8192, 8192), (1024, 131072)],
        "long": [(1024, 10), (8192, 1000), (8192, 32000), (4096, 131072)],
    },
}
TIER_OF_OTHERS = {"cpu": "usual", "cuda": "long"}  # of losses other than kd and lskd


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Every loss at every shape."""
    for tier, shapes in SHAPES[device.type].items():
        for N, C in shapes:
            for loss in LOSSES:
                at_least = "quick" if loss in ("kd", "lskd") else TIER_OF_OTHERS[device.type]
                yield case(loss, N, C, dtype, device, max(tier, at_least, key=TIERS.index))


def case(loss: str, N: int, C: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU, tier: Any = "usual") -> Case:
    """One of LOSSES at N rows and C classes, and its gradient in the student."""
    options = LOSSES[loss]
    with_labels = "ce_weight" in options

    def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
        labels, student, teacher = _draw(2, N, C, dtype, device, seed)
        return student.requires_grad_(), teacher, labels if with_labels else None

    peers = {"liger-kernel": Variant(lambda: loss_step(_liger(**options)), gpu=True)} if loss in ("kd", "js") else {}
    return Case(
        operator=f"kd_loss ({loss})",
        name=f"{N} x {C}",
        shape={"N": N, "C": C},
        dtype=dtype,
        device=device,
        bytes=3 * N * C * dtype.itemsize,  # student and teacher are read, the gradient is written
        # two softmaxes 10, p (log p - log q) 3, gradient 2; moments and their gradient 13; a third softmax 6; log cosh 9
        operations=N * C * (15 + 13 * ("standardize" in options) + 6 * with_labels + 9 * (loss == "js")),
        inputs=inputs,
        exact=in_float64(lambda *x: reference.kd_loss(*x, **options)),
        variants=loss_variants(lambda *x: original(*x, **options), lambda *x: kd_loss(*x, **options), peers),
        tier=tier,
    )


def _draw(networks: int, N: int, C: int, dtype: torch.dtype, device: torch.device, seed: int, skip: int = 0) -> list[Tensor]:
    """Labels, and logits of so many networks after `skip` classes of larger ones: the last row ends where the allocation does."""
    random = torch.Generator(device).manual_seed(seed)
    logits = [torch.randn(N, skip + C, generator=random, device=device).to(dtype)[:, skip:] for _ in range(networks)]
    return [torch.randint(C, (N,), generator=random, device=device), *logits]


def original(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    temperature: float,
    standardize: bool = False,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    divergence: str = "forward",
) -> Tensor:
    """The loss in the originals' own operations."""
    s, t = (_standardize(student), _standardize(teacher)) if standardize else (student, teacher)
    log_q = F.log_softmax(s / temperature, dim=1)
    if divergence == "js":
        log_p = F.log_softmax(t / temperature, dim=1)
        log_m = torch.log((log_q.exp() + log_p.exp()) / 2)
        divergences = F.kl_div(log_m, log_p, reduction="sum", log_target=True) + F.kl_div(log_m, log_q, reduction="sum", log_target=True)
        loss = divergences / 2 * temperature**2 / len(student)
    else:
        loss = F.kl_div(log_q, F.softmax(t / temperature, dim=1), reduction="sum") * temperature**2 / len(student)
    if labels is None:
        return loss
    return ce_weight * F.cross_entropy(student, labels) + kd_weight * loss


def _standardize(x: Tensor) -> Tensor:
    return (x - x.mean(dim=-1, keepdim=True)) / (1e-7 + x.std(dim=-1, keepdim=True))


def _liger(temperature: float, divergence: str = "forward") -> Callable[..., Tensor]:
    liger = importlib.import_module("liger_kernel.transformers")
    kl, js = liger.LigerKLDIVLoss(reduction="batchmean"), liger.LigerJSD()

    def loss(student: Tensor, teacher: Tensor, labels: None) -> Tensor:
        log_q = F.log_softmax(student / temperature, dim=1)
        if divergence == "js":
            return js(log_q, F.log_softmax(teacher / temperature, dim=1)) * temperature**2
        return kl(log_q, F.softmax(teacher / temperature, dim=1)) * temperature**2

    return loss


# ---- small calls -----------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {"temperature": 2.0, "standardize": True, "ce_weight": 0.1, "label_smoothing": 0.1}


def calls(device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
    """Several rows a program, rows in registers and walked rows; few and many gradients; aligned, odd and strided rows."""

    def call(name: str, N: int, C: int, teachers: int = 2, learn: bool = False, skip: int = 0, **options: Any) -> Call:
        def inputs(seed: int) -> list[Tensor]:
            labels, *logits = _draw(1 + teachers, N, C, dtype, device, seed, skip)
            labels[-1] = -100
            return [labels, *(x.requires_grad_(i == 0 or learn) for i, x in enumerate(logits))]

        return loss_call(
            f"{name} {N} x {C}, teachers {teachers}",
            inputs,
            lambda labels, student, *rest: kd_loss(student, rest, labels, **options),
            lambda labels, student, *rest: reference.kd_loss(student, rest, labels, **options),
            launches=None if C > 1000 or learn or skip or "divergence" in options else 3,
        )

    float32 = dtype == torch.float32
    for C in (10, 100, 1001, 4096, 8191, 9001, 12000) if float32 else (10, 1001, 9001):
        yield call("kd", 5, C, teachers=1, temperature=2.0)
        yield call("mutual lskd+ce", 3, C, learn=True, **EVERYTHING)
    for C in (10, 1001, 9001) if float32 else (1001,):
        yield call("js", 5, C, divergence="js", standardize=True)
        yield call("reverse", 5, C, divergence="reverse")
        yield call("strided, summed", 5, C, skip=3, reduction="sum", ce_weight=0.1)
    if float32:
        yield call("kd", 257, 10, teachers=1)
        yield call("five teachers", 64, 100, teachers=5, **EVERYTHING)
    if device.type == "cuda":  # the interpreter would take a minute
        yield call("more programs than one adds up", 1100, 520)


def hostile_calls(device: torch.device) -> None:
    """Labels far above C."""
    for C in (10, 1001, 9001):
        logits = torch.randn(3, C, device=device, requires_grad=True)
        labels = torch.full((3,), C + 5, device=device)
        torch.autograd.grad(kd_loss(logits, logits.detach(), labels, ce_weight=0.1), logits)


# ---- launches whose machine code is read -----------------------------------------------------------------------------


class Request(NamedTuple):
    """The options of kd_loss that change the kernel: K teachers, terms, and which gradients are wanted."""

    K: int = 1
    standardize: bool = False
    ce: bool = False
    divergence: Divergence = "forward"
    student: bool = True
    teachers: bool = False
    upstream: bool = False  # the gradient of the loss is given
    reduction: Reduction = "mean"


REQUESTS = {
    "ce": Request(0, ce=True),
    "kd": Request(),
    "lskd+ce": Request(standardize=True, ce=True),
    "lskd+ce, 5 teachers": Request(5, standardize=True, ce=True),
    "mutual js": Request(standardize=True, ce=True, divergence="js", teachers=True, upstream=True, reduction="none"),
    "mutual js, 5 teachers": Request(5, standardize=True, ce=True, divergence="js", teachers=True, upstream=True),
    "kd, no gradient": Request(student=False),
    "lskd+ce, no gradient": Request(standardize=True, ce=True, student=False),
    "lskd, upstream": Request(standardize=True, upstream=True),
    "mutual kd": Request(teachers=True, upstream=True),
    "reverse": Request(divergence="reverse"),
    "js, 2 teachers": Request(2, standardize=True, divergence="js"),
}
COMMON = ("lskd+ce", "lskd+ce, 5 teachers", "mutual js")
ROWS = 5  # N: nothing is run, and the plan depends on C alone


def launches(target: str) -> Iterator[Launch]:
    """Every plan with the most usual request and those that fill its registers; every request in each regime."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    yield launch(1, "kd", fp32, fp32)
    for C in (2, 4, 8, 10, 20, 50, 100, 200, 500, 1000, 1001, 1024, 2048, 4096, 8192, 32000, 32003, 131072):
        for request in REQUESTS if C in (100, 1000, 8192, 32000) else COMMON:
            yield launch(C, request, fp32, fp32)
        yield rescale_launch(C, fp32)
    for C in (10, 100, 1000, 1001, 4096, 8192, 32000, 32003):
        for request in COMMON:
            yield launch(C, request, bf16, bf16)
        yield launch(C, "lskd+ce", fp32, bf16)
    yield launch(1000, "lskd+ce", fp16, fp16)
    yield rescale_launch(1000, bf16)


def launch(C: int, request: str, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> Launch:
    """loss_and_gradients on [ROWS, C]."""
    from kdfast.kernels import distill_kl as kernel

    r = REQUESTS[request]
    dtypes = (student_dtype, *[teacher_dtype] * r.K)
    wanted = (r.student, *[r.teachers] * r.K)
    options = KDOptions(
        temperature=2.0, standardize=r.standardize, eps=1e-7, kd_weight=0.9 if r.K else 0.0, ce_weight=0.1 if r.ce else 0.0,
        teacher_weights=(1.0,) * r.K, label_smoothing=0.1, ignore_index=-100, divergence=r.divergence, reduction=r.reduction,
    )  # fmt: skip

    def call() -> None:
        student, *teachers = [torch.zeros(ROWS, C, dtype=dtype) for dtype in dtypes]
        labels = torch.zeros(ROWS, dtype=torch.int64) if r.ce else None
        upstream = torch.ones(ROWS if r.reduction == "none" else ()) if r.upstream else None
        kernel.loss_and_gradients(student, teachers, labels, options, wanted, upstream)

    sizes = [ROWS * C * dtype.itemsize for dtype in dtypes]
    reads = kernel.reads(C, r.K, wanted, standardize=r.standardize, divergence=r.divergence)
    read = reads * sum(sizes) // len(sizes)  # launches with two dtypes read each tensor equally often
    if reads > len(sizes) and r.ce and r.teachers:
        read += sizes[0]  # a store to the teachers' gradients keeps the compiler from merging the last walk's two loads of a step
    written = sum(size for size, want in zip(sizes, wanted) if want)
    function = "_resident" if kernel.plan(C, kernel.is_heavy(r.K, wanted)).resident(C) else "_looped"  # _count may be launched before it
    return Launch("distill_kl", ROWS, C, short_names(*dtypes[:2]), request, call, read + written, sum(sizes) + written, function=function)


def rescale_launch(C: int, dtype: torch.dtype) -> Launch:
    """Rescale on a gradient [ROWS, C], by a factor that is not 1."""
    from kdfast.kernels import distill_kl as kernel

    moved = 2 * ROWS * C * dtype.itemsize
    call = partial(kernel.rescale, [torch.zeros(ROWS, C, dtype=dtype)], torch.tensor(2.0), torch.tensor(1.0))
    return Launch("distill_kl", ROWS, C, short_names(dtype), "rescale", call, moved, moved)

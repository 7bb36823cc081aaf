"""supcon_loss with a process group equals supcon_loss on the joined batch: real processes, their values and averaged gradients.

One start of processes a world size runs everything, because starting takes longer than all cases. The processes return their results;
the tests compare them with the reference on the joined batch in float64.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdfast import reference
from kdfast.functional import supcon_loss
from kdfast.losses import ConKDLoss, SupConLoss, SupContrastiveLoss
from kdfast.ops.supcon import eager
from tests.numeric import ALLOWANCE, DEVICE, FLOAT32_ERROR, error, value_and_gradients
from tests.processes import in_processes

pytestmark = [
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo"),
    pytest.mark.skipif(DEVICE != "cpu", reason="the processes talk through gloo, on the CPU"),
]

TILES = [512, 5]  # one block, and tiles or blocks of a few rows
UNEVEN = {2: [7, 2], 4: [3, 0, 8, 1]}

# "sizes": samples of each rank (6 where absent); "shape": what follows them; "labels": how to name samples; "queue": rows
CASES: dict[str, dict[str, Any]] = {
    "labels": {},
    "labels, float32": {"dtype": torch.float32},
    "views": {"shape": (3, 5), "base_temperature": 0.2},
    "float16": {"dtype": torch.float16},
    "simclr, one": {"shape": (2, 5), "labels": None, "contrast_mode": "one"},
    "one": {"shape": (3, 5), "contrast_mode": "one"},
    "duplicates": {"duplicates": 2},
    "duplicates, float32, sum": {"duplicates": 3, "dtype": torch.float32, "reduction": "sum", "self_positive": True},
    "duplicates, one, none": {"duplicates": 2, "contrast_mode": "one", "reduction": "none"},
    "duplicates, queue": {"duplicates": 2, "queue": 9, "queue_labels": True, "normalize": True},
    "duplicates, simclr": {"duplicates": 2, "labels": None, "normalize": True},
    "readme": {"self_positive": True, "normalize": True},
    "none": {"shape": (2, 5), "reduction": "none"},
    "labelled queue, one, none": {"queue": 7, "queue_labels": True, "shape": (2, 5), "contrast_mode": "one", "reduction": "none"},
    "classes of one rank": {"labels": "of one rank"},
    "a small temperature": {"temperature": 0.01},
    "labels of 16 bits": {"labels": torch.int16},
    "labels of one bit": {"labels": torch.bool},
    "uneven": {"sizes": UNEVEN},
    "uneven, classes of one rank": {"sizes": UNEVEN, "labels": "of one rank", "normalize": True},
    "uneven, simclr": {"sizes": UNEVEN, "shape": (2, 5), "labels": None, "reduction": "sum"},
    "uneven, one, queue": {"sizes": UNEVEN, "shape": (2, 5), "contrast_mode": "one", "queue": 4, "queue_labels": True},
    "uneven, duplicates, none": {"sizes": UNEVEN, "duplicates": 2, "reduction": "none"},
    "uneven, bfloat16": {"sizes": UNEVEN, "dtype": torch.bfloat16, "normalize": True},
    "uneven, all rows on one rank": {"sizes": {2: [0, 7], 4: [0, 0, 7, 0]}, "shape": (2, 5)},
}
NOTHING_TO_CONTRAST: dict[str, dict[str, Any]] = {
    "one row": {"sizes": {2: [0, 1], 4: [0, 0, 1, 0]}},
    "no row": {"sizes": {2: [0, 0], 4: [0] * 4}},
    "no row, even": {"even": 0, "queue": 3},
}


class Problem:
    """One case on the joined batch; all processes make the same."""

    def __init__(self, case: dict[str, Any], world: int, number: int):
        options = {"temperature": 0.3} | case
        draw = torch.Generator().manual_seed(number)
        dtype, shape = options.pop("dtype", torch.float64), options.pop("shape", (5,))
        self.uneven = "sizes" in options
        self.sizes: list[int] = options.pop("sizes", {world: [options.pop("even", 6)] * world})[world]
        B, queue = sum(self.sizes), options.pop("queue", 0)
        self.inputs = [torch.randn(B, *shape, generator=draw, dtype=torch.float64).to(dtype)]
        if queue:
            self.inputs.append(torch.randn(queue, shape[-1], generator=draw, dtype=torch.float64).to(dtype))
        labels = options.pop("labels", torch.int64)
        self.labels: Tensor | None = None
        if labels == "of one rank":  # class 0 is everywhere, the others are each on one rank only, once or often
            mine = [torch.arange(size) % 3 for size in self.sizes]
            self.labels = torch.cat([torch.where(m > 0, m + 2 * rank, 0) for rank, m in enumerate(mine)])
        elif labels is not None:
            self.labels = torch.randint(0, 3, (B,), generator=draw).to(labels)
        if options.pop("queue_labels", False):
            options["contrast_labels"] = torch.randint(0, 4, (queue,), generator=draw)
        self.options = options

    def call(self, function: Callable[..., Tensor], rows: slice = slice(None), **more: Any) -> Callable[..., Tensor]:
        """The loss of features and maybe a queue, with the labels of these rows."""
        labels = None if self.labels is None else self.labels[rows]
        return lambda features, contrast=None: function(features, labels, contrast=contrast, **self.options, **more)

    def rows(self, rank: int) -> slice:
        """The rank's own among the joined rows."""
        return slice(sum(self.sizes[:rank]), sum(self.sizes[: rank + 1]))

    def upstream(self) -> Tensor | None:
        """For reduction "none" a weight for each loss, on the joined batch."""
        shape = self.call(reference.supcon_loss)(*self.inputs).shape
        return torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5 if shape else None


def problems(world: int) -> dict[str, Problem]:
    return {name: Problem(case, world, k) for k, (name, case) in enumerate({**CASES, **NOTHING_TO_CONTRAST}.items())}


# ---- in the processes ------------------------------------------------------------------------------------------------


def _every_case(rank: int, world: int) -> dict[str, list[Tensor]]:
    """By case and tile the value, the gradient of this rank's rows and that of the queue."""
    results = {}
    for name, problem in problems(world).items():
        own, upstream = problem.rows(rank), problem.upstream()
        inputs = [problem.inputs[0][own], *problem.inputs[1:]]
        for eager.TILE in TILES:
            call = problem.call(supcon_loss, own, group=dist.group.WORLD, uneven=problem.uneven)
            results[f"{name}, {eager.TILE}"] = value_and_gradients(call, inputs, None if upstream is None else upstream[own])
    return results


# ---- values and gradients --------------------------------------------------------------------------------------------


def _check_cases(world: int, by_rank: list[dict[str, list[Tensor]]]) -> None:
    """Every rank has the joined batch's value, and averaging has its gradient."""
    failures = []
    for name, problem in problems(world).items():
        for tile in TILES:
            ours = [results[f"{name}, {tile}"] for results in by_rank]
            failures += [f"{name}, tile {tile}: {reason}" for reason in _differences(problem, ours)]
            if name in NOTHING_TO_CONTRAST and any(x.any() for result in ours for x in result):
                failures.append(f"{name}, tile {tile}: not zero")
    assert not failures, "\n".join(failures)


def _differences(problem: Problem, by_rank: list[list[Tensor]]) -> list[str]:
    """What is wrong with the ranks' [value, gradient of own rows, gradient of the queue], and with this check."""
    upstream = problem.upstream()
    joined = problem.call(reference.supcon_loss)
    exact = value_and_gradients(joined, [x.double() for x in problem.inputs], upstream)
    eager = value_and_gradients(joined, problem.inputs, upstream)
    values, features, *queues = zip(*by_rank)
    # what DistributedDataParallel does with parameters' gradients, of which each rank has its rows' share
    averaged = len(by_rank) if upstream is None else 1
    gradients = [torch.cat(features).double() / averaged, *(torch.stack(queue).double().sum(0) / averaged for queue in queues)]
    reasons = ["the ranks' values differ"] if upstream is None and any(not torch.equal(values[0], other) for other in values) else []

    dtype = problem.inputs[0].dtype
    least = {torch.float64: 1e-12, torch.float32: FLOAT32_ERROR}.get(dtype, 0.0)
    value = values[0] if upstream is None else torch.cat(values)
    for what, got, peer, want in zip(("value", "gradient", "the queue's gradient"), [value, *gradients], eager, exact):
        allowed = max(least, error(peer, want)) + ALLOWANCE[dtype]
        if not error(got, want) <= allowed:
            reasons.append(f"{what}: error {error(got, want):.2g}, allowed are {allowed:.2g}")
        if want.any() and error(want.roll(1, 0) if what == "gradient" else torch.zeros_like(want), want) <= allowed:
            reasons.append(f"{what}: another would pass")
    return reasons


# ---- modules under DistributedDataParallel ---------------------------------------------------------------------------


class Student(nn.Module):
    """Numbers [B, 6] -> logits [B, 5] and features [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.logits, self.embed = nn.Linear(6, 8).double(), nn.Linear(8, 5).double(), nn.Linear(8, 4).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x).tanh()
        return self.logits(hidden), self.embed(hidden)


LOSSES = ["labels", "simclr", "SupContrastiveLoss", "SupConLoss", "ConKDLoss", "ConKDLoss, notebook"]
SIZES = {"even": [5, 5], "uneven": [6, 3], "a rank without rows": [0, 7]}
# ranks with different numbers of rows: functional.supcon_loss only
SHARED = [(name, shared) for name in LOSSES for shared in SIZES if shared == "even" or name in ("labels", "simclr")]


def _loss(name: str, model: nn.Module, batch: list[Tensor], group: Any, uneven: bool) -> Tensor:
    x, teacher, labels = batch
    logits, features = model(x)
    views = torch.stack([features, logits[:, :4]], 1)
    match name:
        case "labels":
            return supcon_loss(features, labels, temperature=0.2, group=group, uneven=uneven)
        case "simclr":
            return supcon_loss(views, group=group, uneven=uneven)
        case "SupContrastiveLoss":
            return SupContrastiveLoss(0.2, group=group)(features, labels)
        case "SupConLoss":
            return SupConLoss(0.2, "one", group=group)(views, labels)
    variant: Any = "notebook" if "notebook" in name else "readme"
    return ConKDLoss(2.0, 2.0, 0.2, variant=variant, group=group)(teacher, logits, features, labels)


def _batch(sizes: list[int]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    x, t = (torch.randn(sum(sizes), size, generator=draw, dtype=torch.float64) for size in (6, 5))
    return [x, t, torch.randint(0, 3, (sum(sizes),), generator=draw)]


def _parameter_gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def _gradients_under_ddp(rank: int) -> dict[str, list[Tensor]]:
    """By loss, sharing, and with or without the group."""
    results = {}
    for name, shared in SHARED:
        batch = [whole.split(SIZES[shared])[rank] for whole in _batch(SIZES[shared])]
        for group in (dist.group.WORLD, None):
            model = DistributedDataParallel(Student(), find_unused_parameters=True)
            _loss(name, model, batch, group, shared != "even" and group is not None).backward()
            results[f"{name}, {shared}, {group is not None}"] = _parameter_gradients(model)
    return results


def _check_ddp(by_rank: list[dict[str, list[Tensor]]]) -> None:
    """DistributedDataParallel's gradients are those of one process on the joined batch."""
    for name, shared in SHARED:
        model = Student()
        _loss(name, model, _batch(SIZES[shared]), None, False).backward()
        wanted = _parameter_gradients(model)
        for results in by_rank:
            for got, want in zip(results[f"{name}, {shared}, True"], wanted):
                assert (got - want).abs().max() < 1e-12 * max(1, want.abs().max()), f"{name}, {shared}"
            alone = zip(results[f"{name}, {shared}, False"], wanted)
            assert any((got - want).abs().max() > 1e-2 for got, want in alone), f"{name}, {shared}: seeing no other rank would pass"


# ---- the rest of the contract ----------------------------------------------------------------------------------------


def _contract(rank: int, world: int) -> dict[str, Any]:
    """Asserts on every rank; returns the texts of errors."""
    group = dist.group.WORLD
    draw = torch.Generator().manual_seed(rank)
    features, labels = torch.randn(6, 2, 5, generator=draw), torch.randint(0, 3, (6,), generator=draw)

    # a group of one rank is no group, to the bit, mask and all
    groups = [dist.new_group([r]) for r in range(world)]
    mask = torch.rand(6, 6, generator=draw)
    for options in ({"labels": labels}, {"mask": mask}, {"labels": labels, "reduction": "sum", "uneven": True}):
        plain = {name: value for name, value in options.items() if name != "uneven"}
        with_group = value_and_gradients(lambda x, o=options: supcon_loss(x, group=groups[rank], **o), [features])
        without = value_and_gradients(lambda x, o=plain: supcon_loss(x, **o), [features])
        assert all(torch.equal(a, b) for a, b in zip(with_group, without))

    # ranks of a smaller group count from 0
    pairs = [dist.new_group([r, r + world // 2]) for r in range(world // 2)]
    pair, half = pairs[rank % (world // 2)], rank // (world // 2)
    joined = [torch.empty(2 * 6, 2, 5), torch.empty(2 * 6, dtype=torch.int64)]
    dist.all_gather_into_tensor(joined[0], features, group=pair)
    dist.all_gather_into_tensor(joined[1], labels, group=pair)
    for uneven in (False, True):
        for named in (True, False):
            value, gradient = value_and_gradients(
                lambda x, u=uneven, n=named: supcon_loss(x, labels if n else None, group=pair, uneven=u), [features]
            )
            exact = value_and_gradients(lambda x, n=named: reference.supcon_loss(x, joined[1] if n else None), [joined[0].double()])
            assert error(value, exact[0]) < FLOAT32_ERROR
            assert error(gradient / 2, exact[1][6 * half : 6 * half + 6]) < FLOAT32_ERROR

    # backward twice, the same bits; no second derivative; no gradient where none is asked for; strided rows
    leaf = features.clone().requires_grad_()
    value = supcon_loss(leaf, labels, group=group)
    first = torch.autograd.grad(value, leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(value, leaf, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, leaf, create_graph=True)
    own = leaf[: 6 * (rank != 1)]  # none of them on rank 1, which is not to wait for the others' error
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(supcon_loss(own, group=group, uneven=True), leaf, create_graph=True)
    queue = torch.ones(3, 5).requires_grad_()
    supcon_loss(features, labels, contrast=queue, group=group).backward()
    assert queue.grad is not None

    messages = {}
    for name, options in {"mask": {"mask": mask}, "group": {"group": "gloo"}}.items():
        with pytest.raises((TypeError, ValueError)) as raised:
            supcon_loss(features, **({"group": group} | options))
        messages[name] = str(raised.value)
    return messages


def _check_compiled(rank: int) -> None:
    """Compiles without graph break to the same bits."""
    group = dist.group.WORLD
    draw = torch.Generator().manual_seed(rank)
    cases: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((300, 2, 8), {"contrast_mode": "one", "reduction": "sum"}),
        ((300, 8), {"labels": True, "duplicates": 2, "normalize": True}),
        ((6, 2, 8), {"labels": True, "reduction": "none", "contrast": torch.ones(4, 8)}),
    ]
    for shape, options in cases:
        features = torch.randn(shape, generator=draw)
        if options.pop("labels", False):
            options["labels"] = torch.randint(0, 3, shape[:1], generator=draw)
        upstream = torch.rand(shape[:2] if "contrast" in options else (), generator=draw)

        def call(x: Tensor, options: dict[str, Any] = options) -> Tensor:
            return supcon_loss(x, group=group, **options)

        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for a, b in zip(value_and_gradients(compiled, [features], upstream), value_and_gradients(call, [features], upstream)):
            assert torch.equal(a, b)


# ---- tests -----------------------------------------------------------------------------------------------------------


def _work(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {"cases": _every_case(rank, world)}
    if world == 2:
        results["ddp"] = _gradients_under_ddp(rank)
        _check_compiled(rank)
    else:
        results["messages"] = _contract(rank, world)
    return results


def test_two_ranks_have_the_joined_batchs_value_and_ddp_its_gradient(tmp_path: Path) -> None:
    by_rank = in_processes(_work, 2, tmp_path)
    _check_cases(2, [results["cases"] for results in by_rank])
    _check_ddp([results["ddp"] for results in by_rank])


def test_four_ranks_have_the_joined_batchs_value_and_hold_the_contract(tmp_path: Path) -> None:
    by_rank = in_processes(_work, 4, tmp_path)
    _check_cases(4, [results["cases"] for results in by_rank])
    for results in by_rank:
        assert results["messages"] == {
            "mask": "supcon_loss: mask must be None with a group of 4 ranks, whose rows it does not cover: give labels",
            "group": "supcon_loss: group must be a torch.distributed.ProcessGroup or None, got str",
        }


def test_bad_input_is_named() -> None:
    features = torch.ones(4, 3)
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup or None, got int"):
        supcon_loss(features, group=-100)  # type: ignore[arg-type]  # what torch.distributed gives to a process outside a group
    with pytest.raises(ValueError, match="uneven = True needs a group, got None"):
        supcon_loss(features, uneven=True)

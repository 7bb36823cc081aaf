"""Throughput of a distillation step on this machine, and the time of its parts: kdfast bench train

A step is the engine's: the recipe's own stage in channels_last and in autocast, one backward pass, one optimizer step. The images are
random and stay on the device, so the loader is not measured, and neither are the engine's metrics.

    teacher      its forward pass
    student      the student's forward pass, its projection head's included
    losses       the loss terms, and their gradients in the networks' outputs
    backward     from there through the student
    optimizer    the update of the weights

The peer is the same step with the same networks, precision and compilation, but with the originals' losses in eager PyTorch and
lion_pytorch in place of ours. Both run in turn, in one process.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor, nn

from kdfast import files, machine, recipes
from kdfast.benchmarks import distill_kl, supcon, timing
from kdfast.benchmarks.loaders import small_images
from kdfast.data import Batch, make_loaders
from kdfast.engine import Stage, Training, World, join
from kdfast.engine.ranges import Checked, Pixels, Positive, Range
from kdfast.engine.schedule import make_optimizer
from kdfast.engine.stage import Outputs, Terms
from kdfast.models import ModelSpec, create
from kdfast.recipes import Setup
from kdfast.text import markdown_table

AtLeastTwo = Annotated[int, Range("must be at least 2", lambda value: value >= 2)]
PARTS = ("teacher", "student", "losses", "backward", "optimizer")
WARMUP = 3  # steps of each side that are not counted: compilation, and cuDNN's choice of algorithms
ROUNDS = 3  # at least, however long they take


@dataclass(frozen=True)
class Train(Checked):
    """Training-step throughput: images/s, where the time goes, and the same step without kdfast's losses and optimizer."""

    recipe: Literal["kd", "lskd", "conkd"] = "conkd"
    """Method whose losses are computed, with its default settings."""
    student: str = "resnet18"
    """Student's architecture (kdfast list models)."""
    teacher: str | None = None
    """Teacher's architecture; none: resnet101 on CUDA, resnet34 on the CPU."""
    classes: AtLeastTwo = 1000
    """Outputs of both networks."""
    image_size: Pixels | None = None
    """Pixels; none: 224 on CUDA, 64 on the CPU."""
    batch_size: AtLeastTwo | None = None
    """Images a step; none: 256 on CUDA, 32 on the CPU."""
    optimizer: Literal["lion", "adamw", "sgd"] = "lion"
    """The student's optimizer."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast; auto: bf16 on CUDA, fp32 on the CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the forward passes; auto: on CUDA."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seconds: Positive = 30.0
    """Time for the steps that count; networks are made, compiled and warmed up before."""
    out: Path | None = None
    """Also write the numbers, with machine and versions, to this JSON file."""

    def on(self, device: torch.device) -> "Train":
        """These options with nothing left to choose."""
        gpu = device.type == "cuda"
        return replace(
            self,
            teacher=self.teacher or ("resnet101" if gpu else "resnet34"),
            image_size=self.image_size or (224 if gpu else 64),
            batch_size=self.batch_size or (256 if gpu else 32),
            precision=("bf16" if gpu else "fp32") if self.precision == "auto" else self.precision,
            compile=("on" if gpu else "off") if self.compile == "auto" else self.compile,
            device=str(device),
        )


# ---- a step ----------------------------------------------------------------------------------------------------------


class Clock:
    """Marks points in a device's time; on a GPU they are CUDA events, so that a mark waits for nothing."""

    def __init__(self, device: torch.device):
        self._gpu = device.type == "cuda"
        self._steps: list[dict[str, Any]] = []

    @torch.compiler.disable
    def mark(self, part: str) -> None:
        """Ends a part here; "start" begins a step."""
        now: Any = torch.cuda.Event(enable_timing=True) if self._gpu else time.perf_counter()
        if self._gpu:
            now.record()
        if part == "start" or not self._steps:
            self._steps.append({})
        self._steps[-1][part] = now

    def take(self) -> list[dict[str, float]]:
        """Returns the milliseconds of each part, one entry per step, and clears the marks. The device must have finished."""
        steps, self._steps = self._steps, []
        return [{part: self._milliseconds(marks[before], marks[part]) for before, part in pairwise(marks)} for marks in steps]

    def _milliseconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self._gpu else 1e3 * (end - start)


class Step:
    """A side of the comparison: networks, losses and optimizer, ready to step on one batch again and again.

    Args:
        options: as Train.on returns them.
        batch: on the device.
        plain: the originals' losses and optimizer.
    """

    def __init__(self, options: Train, batch: Batch, *, plain: bool):
        device = batch.images.device
        self.clock, self._batch = Clock(device), batch
        # a step's time does not depend on the rate; at this one the weights stay where they are, however many steps fit
        training = Training(optimizer=options.optimizer, lr=1e-6, weight_decay=1e-4, batch_size=len(batch.labels))
        torch.manual_seed(0)  # both sides have the same weights
        teacher = create(str(options.teacher), options.classes)
        teacher.register_forward_hook(lambda *_: self.clock.mark("teacher"))
        self.stage = _stage(options, training, teacher)
        for module in (*self.stage.frozen, *self.stage.train):
            module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.stage.set_modes(training=True)
        self._forward = torch.compile(self.stage.forward) if options.compile == "on" else self.stage.forward
        self._loss = plain_loss(options) if plain else self.stage.loss
        parameters = list(self.stage.parameters())
        self.optimizer = plain_optimizer(parameters, training) if plain else make_optimizer(parameters, training)
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16")

    def __call__(self) -> None:
        """One step, marked."""
        self.clock.mark("start")
        with self._autocast:
            outputs = self._forward(self._batch)
            self.clock.mark("student")
            # cut here, so that the losses' share of the backward pass counts as theirs
            leaves = {name: value.detach().requires_grad_(value.requires_grad) for name, value in outputs.items()}
            terms = self._loss(leaves, self._batch)
        torch.stack([term.float() for term in terms.values() if isinstance(term, Tensor)]).sum().backward()
        self.clock.mark("losses")
        pairs = [(outputs[name], leaf.grad) for name, leaf in leaves.items() if leaf.grad is not None]
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        self.clock.mark("backward")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.mark("optimizer")


def _stage(options: Train, training: Training, teacher: nn.Module) -> Stage:
    """The recipe's stage, as `kdfast distill` would fit it."""
    recipe = recipes.get(options.recipe)
    data = small_images(options.classes, options.classes)  # the stage wants to know of data, but the step brings its own
    setup = Setup(
        data=data,
        training=training,
        teacher_training=training,
        student_spec=ModelSpec(options.student, options.classes),
        teacher_spec=ModelSpec(str(options.teacher), options.classes),
        student_pretrained=False,
        teacher_pretrained=False,
        labels_hidden=False,
        seed=0,
        make_loaders=lambda training, *_: make_loaders(data, batch_size=training.batch_size),
        say=lambda line: None,
    )
    return next(recipe.distil(setup, recipe.settings(), teacher))


def plain_loss(options: Train) -> Callable[[Outputs, Batch], Terms]:
    """The recipe's loss as the originals write it, in eager PyTorch."""
    settings = recipes.get(options.recipe).settings()

    def loss(outputs: Outputs, batch: Batch) -> Terms:
        terms = {
            "ce+kd": distill_kl.original(
                outputs["logits"],
                outputs["teacher"],
                batch.labels,
                temperature=settings.temperature,
                standardize=getattr(settings, "standardize", True),  # conkd always does
                kd_weight=settings.kd_weight,
                ce_weight=settings.ce_weight,
            )
        }
        if options.recipe == "conkd":
            terms["supcon"] = settings.alpha * supcon.eager(outputs["embedding"][:, None], batch.labels)
        return terms

    return loss


def plain_optimizer(parameters: Iterable[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """lion_pytorch's faster form in place of our Lion; others are torch's already."""
    if training.optimizer != "lion":
        return make_optimizer(parameters, training)
    from lion_pytorch.foreach import Lion

    return Lion(parameters, lr=training.lr, weight_decay=training.weight_decay)


# ---- measurement -----------------------------------------------------------------------------------------------------


def measure(options: Train, world: World) -> dict[str, Any]:
    """Both sides in turn.

    Args:
        options: as Train.on returns them.
        world: the device to run on.

    Returns:
        The options, for each side its average_parts, and the speed-up: plain / kdfast, of their average steps.
    """
    torch.manual_seed(0)
    N, size, device = options.batch_size or 0, options.image_size or 0, world.device  # Train.on has chosen them
    images = torch.randn(N, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(options.classes, (N,), device=device)
    batch = Batch(images, labels, torch.arange(N, device=device))
    sides = {"kdfast": Step(options, batch, plain=False), "plain": Step(options, batch, plain=True)}
    memory = {}
    for name, step in sides.items():
        for _ in range(WARMUP):
            step()
        memory[name] = timing.peak_memory(step, device)
        step.clock.take()

    # a GPU is to have the next step's kernels waiting, as in training: several steps before the other side's turn
    turn = 5 if device.type == "cuda" else 1
    end, rounds = time.monotonic() + options.seconds, 0
    while rounds < ROUNDS or time.monotonic() < end:
        for step in sides.values():
            for _ in range(turn):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        rounds += 1

    result: dict[str, Any] = asdict(options)
    del result["out"]
    for name, step in sides.items():
        times, optimizer = step.clock.take(), type(step.optimizer)
        steps = len(times)
        parts = average_parts(times)
        step_ms = sum(parts.values())
        result[name] = {
            "optimizer": f"{optimizer.__module__.split('.')[0]} {optimizer.__name__}",
            "images_per_s": round(1e3 * len(labels) / step_ms, 2),
            "step_ms": round(step_ms, 4),
            "parts_ms": {part: round(ms, 4) for part, ms in parts.items()},
            "losses_and_optimizer": round((parts["losses"] + parts["optimizer"]) / step_ms, 5),
            "memory_bytes": memory[name],
        }
    # of the numbers that the table shows: a median over pairs of steps may lie on the other side of 1
    return result | {"steps": steps, "speedup": round(result["plain"]["step_ms"] / result["kdfast"]["step_ms"], 4)}


def average_parts(steps: list[dict[str, float]]) -> dict[str, float]:
    """Averages each part over the middle half of the steps, ordered by their whole time; unlike medians, these add up to a step."""
    ordered = sorted(steps, key=lambda parts: sum(parts.values()))
    middle = ordered[len(ordered) // 4 : len(ordered) - len(ordered) // 4]
    return {part: statistics.fmean(parts[part] for parts in middle) for part in PARTS}


def make_table(result: dict[str, Any]) -> str:
    """A Markdown table of both sides."""
    sides = (result["kdfast"], result["plain"])
    rows = [(part, *(f"{side['parts_ms'][part]:.2f} ms" for side in sides)) for part in PARTS]
    rows += [
        ("step", *(f"{side['step_ms']:.2f} ms" for side in sides)),
        ("images/s", *(f"{side['images_per_s']:,.1f}" for side in sides)),
        ("losses and optimizer", *(f"{side['losses_and_optimizer']:.2%}" for side in sides)),
        ("memory of the step", *(f"{side['memory_bytes'] / 2**20:,.0f} MB" for side in sides)),
    ]
    return markdown_table(("", "kdfast", f"eager losses, {result['plain']['optimizer']}"), rows)


def run(options: Train) -> dict[str, Any]:
    """Measures, prints the table, and writes options.out where asked to.

    Returns:
        What measure() does.

    Raises:
        ValueError: no such network, recipe or device.
    """
    if options.out is not None:
        files.check_writable(options.out, "--out")
    world = join(options.device)
    options = options.on(world.device)
    print(
        f"{options.recipe}: {options.teacher} -> {options.student}, batch {options.batch_size}, {options.image_size} px, on {world.device}"
    )
    print(f"{options.precision}, compile {options.compile}, {torch.get_num_threads()} threads")
    result = measure(options, world)
    Console().print(Markdown(make_table(result)))
    print(f"{result['speedup']:.3f}x the images/s of the plain step; {result['steps']} steps of each")
    if options.out is not None:
        files.write_json(options.out, machine.document([result]))
    return result

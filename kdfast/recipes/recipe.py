"""What a recipe is, and what it is given: the words that every method file is written in."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.data import HIDDEN, ImageData, Loaders
from kdfast.engine import Mean, Stage, StageResult, Training
from kdfast.engine.distributed import all_processes, mean_over_processes
from kdfast.engine.random_state import derive
from kdfast.functional import kd_loss
from kdfast.models import ModelSpec, create
from kdfast.models.heads import Head
from kdfast.ops.precision import at_least_float32

T = TypeVar("T")
Stages = Generator[Stage, StageResult, T]


class Trained(NamedTuple):
    """What a recipe ends with: a network, images -> logits, and the architecture that its weights belong to."""

    model: nn.Module
    spec: ModelSpec


def each(stages: Stages[T], change: Callable[[Stage], Stage], seen: Callable[[StageResult], object] = lambda result: None) -> Stages[T]:
    """The same stages, each as `change` returns it; `seen` is shown what came of it."""
    result: StageResult | None = None
    while True:
        try:
            stage = stages.send(result) if result is not None else next(stages)
        except StopIteration as end:
            return end.value
        result = yield change(stage)
        seen(result)


def keeping_the_last(stage: Stage) -> Stage:
    """The stage, no epoch of which is chosen by its validation images: these are what the result will be measured on."""
    return replace(stage, keep="last") if stage.best.startswith("val/") else stage


class Extended(nn.Module):
    """A trained network with what a method adds to it (a projection, heads): images -> the network's own logits.

    Args:
        model: images -> logits.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, C]."""
        return self.model(images)


@dataclass(frozen=True)
class Preset:
    """Values that reproduce a source, over the recipe's and the data set's defaults.

    Attributes:
        source: where the values come from, in a sentence.
        values: option name -> value; "teacher_training.<option>" for the teacher's own training.
    """

    source: str
    values: Mapping[str, Any] = field(default_factory=dict)


LARGE_BATCH: Mapping[str, Any] = {
    "batch_size": 2048,
    "optimizer": "lion",
    "lr": 1e-3,
    "weight_decay": 0.1,
    "schedule": "cosine",
    "warmup": 5,
    "precision": "bf16",
}


@dataclass(frozen=True)
class Setup:
    """What a recipe builds its stages from.

    Attributes:
        data: the images.
        training: how the student is trained.
        teacher_training: how a teacher is trained where none is given.
        student_spec: the student's architecture.
        teacher_spec: the teacher's architecture.
        student_pretrained: whether the student starts from torchvision's ImageNet weights.
        teacher_pretrained: whether a teacher that is trained here does.
        labels_hidden: whether some training images have no label (label_fraction < 1).
        seed: where the randomness of this part of the run begins.
        make_loaders: Training, training transform or None for the data set's own, whether all labels are shown -> loaders.
        say: prints a line to the user.
    """

    data: ImageData
    training: Training
    teacher_training: Training
    student_spec: ModelSpec
    teacher_spec: ModelSpec
    student_pretrained: bool
    teacher_pretrained: bool
    labels_hidden: bool
    seed: int
    make_loaders: Callable[[Training, str | None, bool, int], Loaders]
    say: Callable[[str], None]

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.data.classes)

    def loaders(self, training: Training, *, augment: str | None = None, all_labels: bool = False) -> Loaders:
        """Loaders with the batch size of `training`; the student's labels are hidden as asked for unless `all_labels`."""
        return self.make_loaders(training, augment, all_labels, self.seed)

    def stage(self, name: str, **parts: Any) -> Stage:
        """A stage that trains as the student is trained: its images, its training, rows coupled where labels are hidden.

        Args:
            name: of the stage.
            parts: train, frozen, forward, loss and whatever else a Stage has, over the above.
        """
        parts.setdefault("training", self.training)
        parts.setdefault("couples_rows", self.labels_hidden)
        if "data" not in parts:  # making loaders may open files
            parts["data"] = self.loaders(self.training)
        return Stage(name, **parts)

    def student(self, *, head: Head = "linear") -> nn.Module:
        """A new student; the same initial weights at every call of one seed, so that arms are paired."""
        with seeded(derive(self.seed, "student")):
            return _new(replace(self.student_spec, head=head), self.student_pretrained)

    def new_teacher(self) -> nn.Module:
        """A new, untrained teacher."""
        with seeded(derive(self.seed, "teacher")):
            return _new(self.teacher_spec, self.teacher_pretrained)


def _new(spec: ModelSpec, pretrained: bool) -> nn.Module:
    return create(spec.name, spec.num_classes, head=spec.head, pretrained=pretrained, **spec.options)


@contextmanager
def seeded(seed: int) -> Generator[None, None, None]:
    """Within the block torch draws from `seed`; afterwards it continues as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def save_network(teacher: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of the teacher's network alone, without a method's own parts."""
    return dict((teacher.model if isinstance(teacher, Extended) else teacher).state_dict()), {}


@dataclass(frozen=True)
class Recipe:
    """A distillation method.

    Attributes:
        name: as on the command line, in folders and tables.
        title: one line: the method and its paper.
        settings: the dataclass of the method's own hyper-parameters.
        presets: by name; "default" is given, "large-batch" follows from it.
        distil: (setup, settings, teacher) -> stages that end with the trained student.
        teacher: (setup, settings, the given teacher or None) -> stages that end with the teacher; None where a given one is taken as
            it is, and a missing one is trained on labels.
        needs_teacher: False for methods in which a network teaches itself.
        save_teacher: trained teacher -> (tensors, facts) of its file. A fact NAME says that the tensors NAME.* are not the network's.
        load_teacher: (network, tensors, facts of its file) -> teacher; restores what `save_teacher` added.
    """

    name: str
    title: str
    settings: type
    presets: Mapping[str, Preset]
    distil: Callable[[Setup, Any, nn.Module | None], Stages[Trained]]
    teacher: Callable[[Setup, Any, Trained | None], Stages[Trained]] | None = None
    needs_teacher: bool = True
    save_teacher: Callable[[nn.Module], tuple[dict[str, Tensor], dict[str, str]]] = save_network
    load_teacher: Callable[[nn.Module, Mapping[str, Tensor], Mapping[str, Any]], nn.Module] = lambda network, tensors, facts: network

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"Recipe: name must be letters, digits and _, since folders are called so, got {self.name!r}")
        if "default" not in self.presets:
            raise ValueError(f"Recipe {self.name}: presets must have one called default, got {', '.join(self.presets) or 'none'}")
        large = Preset(
            "2,048 images a step over all processes, Lion with warm-up and cosine, bf16; contrastive terms see the images of all processes",
            {**self.presets["default"].values, **LARGE_BATCH},
        )
        object.__setattr__(self, "presets", {**self.presets, "large-batch": large})


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, hidden: bool = True) -> Mean:
    """Mean cross-entropy over the images whose label is not hidden (-100), of all processes together; 0 where all are hidden.

    Each process divides by the mean count over processes: averaging their gradients then gives the mean over all labelled images.

    Args:
        logits: [B, C].
        labels: int64 [B].
        label_smoothing: in [0, 1].
        hidden: False promises that no label of any process is hidden, and spares counting them.
    """
    total = F.cross_entropy(at_least_float32(logits), labels, reduction="sum", label_smoothing=label_smoothing)
    if not hidden:
        return Mean(total / len(labels), len(labels))
    count = (labels != HIDDEN).sum()
    if torch.is_grad_enabled():  # in validation the processes may have different numbers of batches
        count = mean_over_processes(count)
    return Mean(total / torch.where(count > 0, count, 1), count)


def alone_where_hidden(labels: Tensor, index: Tensor) -> Tensor:
    """The labels [n] of the images of this index [n], and for one whose label is hidden a class of its own."""
    return torch.where(labels == HIDDEN, -1 - index, labels)


def contrasted_processes() -> "dist.ProcessGroup | None":
    """Those whose images are contrasted with this one's: in validation none, for processes may have different numbers of batches."""
    return all_processes() if torch.is_grad_enabled() else None


def ce_and_kd(
    student: Tensor, teacher: Tensor | Sequence[Tensor], labels: Tensor, *, ce_weight: float, kd_weight: float, hidden: bool, **options: Any
) -> dict[str, Tensor | Mean]:
    """The terms of logit distillation: cross-entropy where there is a label, the teacher everywhere.

    One fused call where every image has its label. Where some are hidden the two terms have different rows, hence two calls:
    kd_loss leaves an image without a label out of both.
    """
    if not hidden and ce_weight:
        return {"ce+kd": kd_loss(student, teacher, labels, ce_weight=ce_weight, kd_weight=kd_weight, **options)}
    terms: dict[str, Tensor | Mean] = {"kd": kd_loss(student, teacher, kd_weight=kd_weight, **options)}
    if ce_weight:
        smoothing = options.get("label_smoothing", 0.0)
        terms["ce"] = ce_weight * cross_entropy(student, labels, label_smoothing=smoothing, hidden=hidden)
    return terms

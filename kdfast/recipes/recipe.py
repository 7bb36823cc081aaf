"""The parts that every recipe is written with: Recipe, Preset, Setup, and the loss terms that recipes share."""

from collections.abc import Callable, Generator, Mapping
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
from kdfast.models import ModelSpec, create
from kdfast.models.heads import Head
from kdfast.ops.precision import at_least_float32

T = TypeVar("T")
Stages = Generator[Stage, StageResult, T]


class Trained(NamedTuple):
    """The result of a recipe: a network, images -> logits, and its architecture."""

    model: nn.Module
    spec: ModelSpec


def map_stages(
    stages: Stages[T], change: Callable[[Stage], Stage], on_result: Callable[[StageResult], object] = lambda result: None
) -> Stages[T]:
    """Yields the same stages, each changed by `change`; `on_result` is called with every result."""
    result: StageResult | None = None
    while True:
        try:
            stage = stages.send(result) if result is not None else next(stages)
        except StopIteration as end:
            return end.value
        result = yield change(stage)
        on_result(result)


def keep_last_epoch(stage: Stage) -> Stage:
    """Returns the stage without a choice of epochs by validation images, for runs that are measured on those images."""
    return replace(stage, keep="last") if stage.best.startswith("val/") else stage


class Extended(nn.Module):
    """A trained network with a method's own parts (a projection, heads): images -> the network's own logits.

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
    """Values that reproduce a source. They replace the defaults of the recipe and of the data set.

    Attributes:
        source: where the values come from, in a sentence.
        values: option name -> value; "teacher_training.<option>" for the teacher's own training.

    Example:
        >>> from kdfast.recipes import Preset
        >>> Preset("ImageNet, ResNet-34 to ResNet-18: T = 1", {"temperature": 1.0, "epochs": 100}).values["epochs"]
        100
    """

    source: str
    values: Mapping[str, Any] = field(default_factory=dict)


LARGE_BATCH = Preset(
    "2,048 images a step over all processes, Lion with warm-up and cosine, bf16; contrastive terms see the images of all processes",
    {"batch_size": 2048, "optimizer": "lion", "lr": 1e-3, "weight_decay": 0.1, "schedule": "cosine", "warmup": 5, "precision": "bf16"},
)


@dataclass(frozen=True)
class Setup:
    """The inputs of a recipe: data, architectures, trainings.

    Attributes:
        data: the images.
        training: how the student is trained.
        teacher_training: how a teacher is trained if none is given.
        student_spec: the student's architecture.
        teacher_spec: the teacher's architecture.
        student_pretrained: the student starts from torchvision's ImageNet weights.
        teacher_pretrained: a teacher trained in this run starts from torchvision's ImageNet weights.
        labels_hidden: some training images have no label (label_fraction < 1).
        seed: of the random numbers of this part of the run.
        make_loaders: (training, transform of training images or None for the data set's own, show all labels, seed) -> loaders.
        say: prints a line to the user.

    Example:
        A recipe gets its setup from `kdfast distill`; this one has no data.

        >>> from kdfast.engine import Training
        >>> from kdfast.models import ModelSpec, parameter_count
        >>> from kdfast.recipes import Setup
        >>> setup = Setup(
        ...     data=None,
        ...     training=Training(epochs=30),
        ...     teacher_training=Training(epochs=30),
        ...     student_spec=ModelSpec("resnet8", 10),
        ...     teacher_spec=ModelSpec("resnet20", 10),
        ...     student_pretrained=False,
        ...     teacher_pretrained=False,
        ...     labels_hidden=False,
        ...     seed=0,
        ...     make_loaders=lambda training, transform, all_labels, seed: None,
        ...     say=print,
        ... )
        >>> parameter_count(setup.student())
        78042
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
        """Number of classes."""
        return len(self.data.classes)

    def loaders(self, training: Training, *, augment: str | None = None, all_labels: bool = False) -> Loaders:
        """Makes loaders with the batch size of `training`; `all_labels` shows the labels that are hidden from the student."""
        return self.make_loaders(training, augment, all_labels, self.seed)

    def stage(self, name: str, **parts: Any) -> Stage:
        """Makes a stage with the student's images and training; hidden labels couple rows.

        Args:
            name: of the stage.
            parts: train, frozen, forward, loss and any other field of Stage.
        """
        if "data" not in parts:  # making loaders may open files
            parts["data"] = self.loaders(self.training)
        return Stage(name, **{"training": self.training, "couples_rows": self.labels_hidden, **parts})

    def student(self, *, head: Head = "linear") -> nn.Module:
        """Makes a new student; its initial weights depend on the seed only, so that students with and without teacher are paired."""
        with seeded(derive(self.seed, "student")):
            return _new(replace(self.student_spec, head=head), self.student_pretrained)

    def new_teacher(self) -> nn.Module:
        """Makes a new, untrained teacher."""
        with seeded(derive(self.seed, "teacher")):
            return _new(self.teacher_spec, self.teacher_pretrained)


def _new(spec: ModelSpec, pretrained: bool) -> nn.Module:
    return create(spec.name, spec.num_classes, head=spec.head, pretrained=pretrained, **spec.options)


@contextmanager
def seeded(seed: int) -> Generator[None, None, None]:
    """Seeds torch within the block; afterwards its random state is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def save_network(teacher: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the weights of the teacher's network, without a method's own parts, and no facts."""
    return dict((teacher.model if isinstance(teacher, Extended) else teacher).state_dict()), {}


@dataclass(frozen=True)
class Recipe:
    """A distillation method.

    Attributes:
        name: on the command line, in folders and tables.
        title: one line: the method and its paper.
        settings: the dataclass of the method's own hyper-parameters.
        presets: by name, with one called "default"; "large-batch" is added.
        distil: (setup, settings, teacher) -> stages that end with the trained student.
        teacher: (setup, settings, the given teacher or None) -> stages that end with the teacher; None: a given teacher is used
            unchanged, and a missing one is trained on labels.
        needs_teacher: False for methods in which a network teaches itself.
        save_teacher: trained teacher -> (tensors, facts) of its file. A fact NAME says that the tensors NAME.* are not the network's.
        load_teacher: (network, tensors, facts of its file) -> teacher; restores the parts that `save_teacher` added.

    Raises:
        ValueError: the name is no identifier, or there is no default preset.

    Example:
        docs/recipes.md has a whole recipe. This one returns its student untrained.

        >>> from dataclasses import dataclass
        >>> from kdfast.recipes import Preset, Recipe
        >>> @dataclass(frozen=True)
        ... class Settings:
        ...     weight: float = 1.0
        >>> def distil(setup, settings, teacher):
        ...     return setup.student(), setup.student_spec
        ...     yield  # stages
        >>> recipe = Recipe("untrained", "No training", Settings, {"default": Preset("weight 1")}, distil)
        >>> sorted(recipe.presets)
        ['default', 'large-batch']
    """

    name: str
    title: str
    settings: type
    presets: Mapping[str, Preset]
    distil: Callable[[Setup, Any, Any], Stages[Trained]]
    teacher: Callable[[Setup, Any, Trained | None], Stages[Trained]] | None = None
    needs_teacher: bool = True
    save_teacher: Callable[[nn.Module], tuple[dict[str, Tensor], dict[str, str]]] = save_network
    load_teacher: Callable[[nn.Module, Mapping[str, Tensor], Mapping[str, Any]], nn.Module] = lambda network, tensors, facts: network

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(f"Recipe: name must be letters, digits and _, since folders are called so, got {self.name!r}")
        if not isinstance(self.presets, Mapping) or not callable(self.distil) or not isinstance(self.settings, type):
            raise TypeError(f"Recipe {self.name}: settings must be a dataclass, presets Presets by name and distil a function")
        if "default" not in self.presets:
            raise ValueError(f"Recipe {self.name}: presets must have one called default, got {', '.join(self.presets) or 'none'}")
        large = replace(LARGE_BATCH, values={**self.presets["default"].values, **LARGE_BATCH.values})
        object.__setattr__(self, "presets", {**self.presets, "large-batch": large})


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, hidden: bool = True) -> Mean:
    """Returns the mean cross-entropy over the labelled images of all processes (hidden labels are -100); 0 if all are hidden.

    Each process divides by the mean count over processes, so the average of their gradients is that of the mean over all labelled images.

    Args:
        logits: [B, C].
        labels: int64 [B].
        label_smoothing: in [0, 1].
        hidden: False promises that no label of any process is hidden, which saves the count.
    """
    total = F.cross_entropy(at_least_float32(logits), labels, reduction="sum", label_smoothing=label_smoothing)
    if not hidden:
        return Mean(total / len(labels), len(labels))
    count = (labels != HIDDEN).sum()
    if torch.is_grad_enabled():  # in validation processes may have different numbers of batches
        count = mean_over_processes(count)
    return Mean(total / torch.where(count > 0, count, 1), count)


def separate_hidden(labels: Tensor, index: Tensor) -> Tensor:
    """Returns labels [n] in which every image with a hidden label is a class of its own, by its index [n]."""
    return torch.where(labels == HIDDEN, HIDDEN - 1 - index, labels)  # beyond HIDDEN, which supcon_loss leaves out


def contrast_group() -> "dist.ProcessGroup | None":
    """Returns the processes whose images are contrasted with this one's; none in validation, where their numbers of batches may differ."""
    return all_processes() if torch.is_grad_enabled() else None

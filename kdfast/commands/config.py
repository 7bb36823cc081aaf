"""Everything that a run can be asked for, as dataclasses: options of the command line, keys of config.toml.

A field's docstring is its help text. DATASETS has the values that suit each data set, and a recipe's presets those of a source;
command_line.resolve() says which value wins.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro

from kdfast import recipes
from kdfast.data.loaders import LoaderName
from kdfast.engine import Training
from kdfast.engine.ranges import AtLeastOne, BelowOne, Checked, Count, NotNegative, Pixels, Processes, Range, Seed, UpToOne
from kdfast.recipes.plus import Term

S = TypeVar("S")
C = TypeVar("C")
FLAT = tyro.conf.OmitArgPrefixes  # --epochs, not --training.epochs
Absent = Annotated[S, tyro.conf.Fixed, tyro.conf.Suppress]  # a field that is no option of the command


def default_is(meaning: str) -> Any:
    """Help that shows `meaning` in place of a default of None or an empty text."""
    return tyro.conf.arg(help_behavior_hint=lambda default: f"(default: {meaning if default in ('None', repr('')) else default})")


OWN = default_is("the data set's own")


@dataclass(frozen=True)
class DataOptions(Checked):
    """The images and their preparation."""

    dataset: str = "digits"
    """Data set by name (kdfast list datasets), or the path of an image folder."""
    data_dir: Path | None = None
    """Folder that holds the data set, or that it is downloaded to."""
    val_fraction: BelowOne = 0.1
    """Fraction of the training images set aside for validation, which chooses the best epoch; 0: no epoch is chosen, the last counts."""
    use_test: bool = True
    """Use test/ of an image folder; without it, which a test/ without labels needs, val/ or a tenth of the images is the test."""
    label_fraction: Annotated[float, Range("must be above 0 and at most 1", lambda value: 0 < value <= 1)] = 1.0
    """Fraction of the training images whose labels the student sees; a teacher that is trained first sees all labels."""
    max_images: AtLeastOne | None = None
    """Use at most this many training images, the same fraction of every class."""
    max_bad_files: Count = 0
    """Leave out up to this many image files that cannot be read; with more, the run does not begin."""
    image_size: Annotated[Pixels | None, OWN] = None
    """Side of the square input in pixels."""
    augment: Annotated[str | None, OWN] = None
    """Training augmentation by name (docs/loaders.md); "none" only resizes images."""
    evaluation: Annotated[str | None, OWN] = None
    """Resizing for evaluation: squash, center-crop, or "none" for images that have the size already."""
    normalization: Annotated[str | None, OWN] = None
    """Mean and standard deviation of the channels, by name: imagenet, cifar10, ..."""
    loader: LoaderName = "auto"
    """Image loader; auto: resident if the images fit on the device, else dali if it is installed, else torchvision."""
    workers: Annotated[Processes | None, default_is("chosen by the data")] = None
    """Processes (torchvision) or threads (dali) of the loader."""


@dataclass(frozen=True)
class RunOptions(Checked):
    """The place and the manner of a run."""

    seed: Seed = 0
    """Seed of all randomness: splits, labels that are shown, initial weights, order, augmentation."""
    seeds: AtLeastOne = 1
    """Number of seeds: the student is trained once with each, the teacher once in all."""
    baseline: bool = True
    """Also train the student without the teacher, for comparison."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:N."""
    threads: Annotated[
        Annotated[int, Range("must be at least 1", lambda value: value >= 1, most=4096)] | None, default_is("one a core")
    ] = None
    """CPU threads of PyTorch."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of autocast; auto: bf16 on CUDA, fp32 on the CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the forward passes; auto: only on CUDA."""
    strict: bool = False
    """Treat a teacher that is no better than chance as an error, not a warning."""
    checkpoint_minutes: NotNegative = 15.0
    """Minutes between checkpoints within an epoch; the end of every epoch is saved in any case."""
    out: Annotated[Path | None, default_is("a new one under runs/")] = None
    """Run folder."""
    resume: bool = False
    """Continue the run in --out, whose options need not be repeated; without --out, the newest run under runs/ with the same options."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also log to these services."""


# these fields do not change what a run computes, so they may differ when it is resumed
FREE_ON_RESUME = {"out", "resume", "log", "workers", "checkpoint_minutes"}


@dataclass(frozen=True)
class Distill(Checked, Generic[S]):
    """Distil a teacher into a student."""

    recipe: str = "conkd"
    """Method by name (kdfast list recipes), or package.module:RECIPE."""
    preset: str = "default"
    """Named set of values from a source (kdfast list presets)."""
    teacher: str = "train"
    """A run folder or a weights file; "train" trains a teacher first."""
    teacher_model: str = "resnet56"
    """Architecture of the teacher (kdfast list models), or package.module:function."""
    teacher_options: tuple[str, ...] = ()
    """Options of the teacher's architecture, as key=value."""
    teacher_normalization: Annotated[str | None, default_is("read from the file, else the student's")] = None
    """Normalization that the teacher's weights expect, by name."""
    teacher_pretrained: bool = False
    """Start the teacher from torchvision's ImageNet weights."""
    student: str = "resnet20"
    """Architecture of the student (kdfast list models), or package.module:function."""
    student_options: tuple[str, ...] = ()
    """Options of the student's architecture, as key=value."""
    pretrained: bool = False
    """Start the student from torchvision's ImageNet weights."""
    plus: tuple[str, ...] = ()
    """Loss terms added to the recipe's own: kd, lskd or supcon, each with optional values, as in kd:weight=0.5,temperature=2."""
    method: Annotated[S, FLAT] = field(default=None)  # type: ignore[assignment]
    """Hyper-parameters of the method."""
    data: Annotated[DataOptions, FLAT] = DataOptions()
    training: Annotated[Training, FLAT] = Training()
    teacher_training: Training = Training()
    run: Annotated[RunOptions, FLAT] = RunOptions()

    def __post_init__(self) -> None:
        super().__post_init__()
        for term in self.plus:
            Term.parse(term)


@dataclass(frozen=True)
class TeachRunOptions(RunOptions):
    """The place and the manner of a run."""

    # no options of `kdfast teacher`; config.toml has them nevertheless
    seeds: Absent[int] = 1
    baseline: Absent[bool] = True
    strict: Absent[bool] = False


@dataclass(frozen=True)
class Teach(Checked):
    """Train one network on labels, for use as a teacher."""

    model: str = "resnet56"
    """Architecture (kdfast list models), or package.module:function."""
    model_options: tuple[str, ...] = ()
    """Options of the architecture, as key=value."""
    pretrained: bool = False
    """Start from torchvision's ImageNet weights."""
    label_smoothing: UpToOne = 0.0
    """Label smoothing of the cross-entropy."""
    data: Annotated[DataOptions, FLAT] = DataOptions()
    training: Annotated[Training, FLAT] = Training()
    run: Annotated[TeachRunOptions, FLAT] = TeachRunOptions()


_CIFAR = {"teacher_model": "resnet56", "student": "resnet20"}
_PHOTOGRAPHS = {
    "teacher_model": "resnet50",
    "student": "resnet18",
    "lr": 0.1,
    "nesterov": True,
    "weight_decay": 5e-5,
    "schedule": "cosine",
    "warmup": 2,
    "epochs": 60,
}

# values that suit each data set; for the rest, the dataclasses' defaults are CIFAR's training
DATASETS: Mapping[str, Mapping[str, Any]] = {
    "digits": {
        "teacher_model": "resnet20",
        "student": "resnet8",
        "label_fraction": 0.05,
        "seeds": 5,
        "threads": 1,  # networks this small are slower on two
        "optimizer": "lion",
        "lr": 1e-3,
        "weight_decay": 0.1,
        "schedule": "cosine",
        "epochs": 30,
    },
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "tiny-imagenet": {**_CIFAR, "teacher_model": "resnet34_cifar", "student": "resnet18_cifar"},
    "imagenette": _PHOTOGRAPHS,
    "folder": _PHOTOGRAPHS,
}


def defaults(recipe: Any, preset: str, dataset: str | None) -> "Distill[Any]":
    """Returns the configuration of a recipe's preset on a data set (None: the preset's, else digits), before the command line.

    Raises:
        ValueError: there is no such preset.
    """
    if preset not in recipe.presets:
        raise ValueError(f"preset must be one of {', '.join(recipe.presets)} for recipe {recipe.name}, got {preset!r}")
    values = recipe.presets[preset].values
    dataset = dataset or values.get("dataset", "digits")
    suited = _suited(dataset)
    if preset not in ("default", "large-batch"):  # a source brings its whole training
        suited = {name: suited[name] for name in ("teacher_model", "student", "threads") if name in suited}
    config: Distill[Any] = Distill(recipe=recipe.name, preset=preset, method=recipe.settings())
    return update(config, {**_for_both(suited), **_for_both(values), "dataset": dataset})


def _for_both(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values; the student's training among them is the teacher's too."""
    training = {f.name for f in fields(Training)}
    return {f"teacher_training.{name}": value for name, value in values.items() if name in training} | dict(values)


def teach_defaults(dataset: str | None) -> Teach:
    """Returns the configuration of `kdfast teacher` on a data set (None: digits), before the command line."""
    chosen = _suited(dataset or "digits")
    values = {k: v for k, v in chosen.items() if k not in ("teacher_model", "student", "label_fraction", "seeds")}
    return update(Teach(model=chosen["teacher_model"]), {**values, "dataset": dataset or "digits"})


def _suited(dataset: str) -> Mapping[str, Any]:
    """The values that suit a data set; a path is an image folder."""
    return DATASETS.get(dataset, DATASETS["folder"])


def update(config: C, values: Mapping[str, Any]) -> C:
    """Returns `config` with each value in the field of its name, in whichever part that is.

    Raises:
        ValueError: a name that no field has, or a value that a field refuses.
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        part, _, rest = name.rpartition(".")
        parts.setdefault(part or _home(config, name), {})[rest] = value
    own = parts.pop("", {})
    return replace(config, **own, **{part: update(getattr(config, part), inner) for part, inner in parts.items()})  # type: ignore[type-var]


def _home(config: Any, name: str) -> str:
    """The first part of config that has a field of this name ("": config itself); teacher_training is reached by its full name only."""
    if any(f.name == name for f in fields(config)):
        return ""
    for f in fields(config):
        part = getattr(config, f.name)
        if f.name != "teacher_training" and is_dataclass(part) and any(inner.name == name for inner in fields(part)):
            return f.name
    raise ValueError(f"there is no option {name!r}")


def check_effects(found: "Teach | Distill[Any]", default: "Teach | Distill[Any]") -> None:
    """Checks that every option of the command line changes the run.

    Args:
        found: the configuration.
        default: the same before the command line.

    Raises:
        ValueError: an option is without effect beside the others.
    """
    idle = {"training": found.training.idle(), "data": {}, "": {}}
    if found.data.dataset not in DATASETS.keys() - {"digits"}:
        idle["data"] = {"data_dir": f"with dataset {found.data.dataset}"}
    if isinstance(found, Distill):
        needs_teacher, given = recipes.get(found.recipe).needs_teacher, found.teacher != "train"
        idle |= {"teacher_training": found.teacher_training.idle(), "method": getattr(found.method, "idle", dict)()}
        if not needs_teacher:  # scripts that try every recipe name both networks and trainings, which is no mistake
            names = ("teacher_options", "teacher_normalization", "teacher_pretrained", "strict")
            idle[""] = dict.fromkeys(names, f"with recipe {found.recipe}, which has no teacher")
        else:
            idle[""] = {"teacher_pretrained": "with --teacher"} if given else {"teacher_normalization": "without --teacher"}
    for part, reasons in idle.items():
        here, before = (getattr(config, part) if part else config for config in (found, default))
        for name, reason in reasons.items():
            holder, other = (here, before) if hasattr(here, name) else (found.run, default.run)
            if getattr(holder, name) != getattr(other, name):
                prefix = "teacher_training." if part == "teacher_training" else ""
                raise ValueError(f"{prefix}{name} has no effect {reason}")


def parse_options(options: tuple[str, ...], name: str) -> dict[str, Any]:
    """Returns ("shortcut=A", "width=2") as {"shortcut": "A", "width": 2}.

    Raises:
        ValueError: one is not key=value.
    """
    parsed = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise ValueError(f"{name} must be key=value, got {option!r}")
        try:
            parsed[key] = json.loads(value)
        except json.JSONDecodeError:
            parsed[key] = value
    return parsed

"""Everything that a run can be asked for, as dataclasses: options of the command line, keys of config.toml.

Values come in four layers, the later over the earlier: the dataclasses' own, what suits the data set (DATASETS), the recipe's preset,
the command line (or a config.toml). Of the data set a preset that reproduces a source takes only the networks: how they are trained is
the source's business. A key stands for the field of that name wherever it is; what a data set or a preset says of training holds for the
teacher's too, but for what it says under "teacher_training.<field>". A warm-up of a lower layer is cut to fit the epochs of a higher one.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tomlkit
import tyro

from kdfast.engine import Training
from kdfast.recipes.plus import Term

S = TypeVar("S")
C = TypeVar("C")
FLAT = tyro.conf.OmitArgPrefixes  # --epochs, not --training.epochs
Absent = Annotated[S, tyro.conf.Fixed, tyro.conf.Suppress]  # a field that is no option of the command


def unsaid(what: str) -> Any:
    """Help that says what None or an empty text stands for, where that is the default."""
    return tyro.conf.arg(help_behavior_hint=lambda default: f"(default: {what if default in ('None', repr('')) else default})")


OWN = unsaid("the data set's own")


@dataclass(frozen=True)
class DataOptions:
    """Which images, and how they are shown."""

    dataset: str = "digits"
    """Data set by name (kdfast list datasets), or the path of an image folder."""
    data_dir: Path | None = None
    """Where the data set is, or is downloaded to."""
    val_fraction: float = 0.1
    """Part of the training images set aside to choose the best epoch; 0: the test images choose it."""
    label_fraction: float = 1.0
    """Part of the training images whose label is seen; a teacher that is trained for a student sees all."""
    max_images: int | None = None
    """At most so many training images, the same share of every class."""
    max_bad_files: int = 0
    """Leave out up to so many image files that cannot be read; more end the run before it begins."""
    image_size: Annotated[int | None, OWN] = None
    """Pixels."""
    augment: Annotated[str | None, OWN] = None
    """Training augmentation by name (docs/loaders.md); "none" only resizes images."""
    evaluation: Annotated[str | None, OWN] = None
    """How images are sized for evaluation: squash, center-crop, or "none" where they have the size already."""
    normalization: Annotated[str | None, OWN] = None
    """Mean and deviation by name: imagenet, cifar10, ..."""
    loader: Literal["auto", "dali", "resident", "torchvision"] = "auto"
    """Where images come from; auto: on the device if they fit there, else DALI where installed, else torchvision."""
    workers: Annotated[int | None, unsaid("chosen by the data")] = None
    """Loader processes (torchvision) or threads (dali)."""

    def __post_init__(self) -> None:
        if not 0 < self.label_fraction <= 1:
            raise ValueError(f"label_fraction must be above 0 and at most 1, got {self.label_fraction}")


@dataclass(frozen=True)
class RunOptions:
    """Where and how to run."""

    seed: int = 0
    """Where all randomness begins: splits, labels shown, initial weights, order, augmentation."""
    seeds: int = 1
    """Repeat the student's training with so many seeds; the teacher is trained once."""
    baseline: bool = True
    """Train the same student without the teacher too, for comparison."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: Annotated[int | None, unsaid("as many as there are cores")] = None
    """CPU threads."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast; auto: bf16 on CUDA, fp32 on the CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the forward passes; auto: on CUDA."""
    strict: bool = False
    """A teacher that is no better than chance is an error, not a warning."""
    checkpoint_minutes: float = 15.0
    """Save at least this often within long epochs; every epoch's end is saved anyway."""
    out: Annotated[Path | None, unsaid("a new one under runs/")] = None
    """Run folder."""
    resume: bool = False
    """Continue the run in --out, whose options need not be repeated; without --out the newest run under runs/ that has the very same."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also log to these."""

    def __post_init__(self) -> None:
        for name in ("seeds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


# fields that say where and how fast a run goes, not what it computes: they may differ when it is resumed
FREE_ON_RESUME = {"out", "resume", "log", "workers", "checkpoint_minutes"}


@dataclass(frozen=True)
class Distill(Generic[S]):
    """A distillation: teacher in, student out."""

    recipe: str = "conkd"
    """Method (kdfast list recipes), or package.module:RECIPE."""
    preset: str = "default"
    """Values of a source (kdfast list presets)."""
    teacher: str = "train"
    """A run folder or a weights file; "train" trains one first."""
    teacher_model: str = "resnet56"
    """Teacher's architecture (kdfast list models), or package.module:function."""
    teacher_options: tuple[str, ...] = ()
    """Options of the teacher's architecture, key=value."""
    teacher_normalization: Annotated[str | None, unsaid("read from the file, else the student's")] = None
    """Normalization that the teacher's weights expect."""
    teacher_pretrained: bool = False
    """Start the teacher from torchvision's ImageNet weights."""
    student: str = "resnet20"
    """Student's architecture."""
    student_options: tuple[str, ...] = ()
    """Options of the student's architecture, key=value."""
    pretrained: bool = False
    """Start the student from torchvision's ImageNet weights."""
    plus: tuple[str, ...] = ()
    """Terms beside the recipe's own: kd, lskd or supcon, each with :weight=W,temperature=T where others than the usual are wanted."""
    method: Annotated[S, FLAT] = field(default=None)  # type: ignore[assignment]
    """Hyper-parameters of the method itself."""
    data: Annotated[DataOptions, FLAT] = DataOptions()
    training: Annotated[Training, FLAT] = Training()
    teacher_training: Training = Training()
    run: Annotated[RunOptions, FLAT] = RunOptions()

    def __post_init__(self) -> None:
        for term in self.plus:
            Term.parse(term)


@dataclass(frozen=True)
class TeachRunOptions(RunOptions):
    """Where and how to run."""

    # of a distillation; config.toml has them all the same
    seeds: Absent[int] = 1
    baseline: Absent[bool] = True
    strict: Absent[bool] = False


@dataclass(frozen=True)
class Teach:
    """Supervised training of one network, for use as a teacher."""

    model: str = "resnet56"
    """Architecture (kdfast list models), or package.module:function."""
    model_options: tuple[str, ...] = ()
    """Options of the architecture, key=value."""
    pretrained: bool = False
    """Start from torchvision's ImageNet weights."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""
    data: Annotated[DataOptions, FLAT] = DataOptions()
    training: Annotated[Training, FLAT] = Training()
    run: Annotated[TeachRunOptions, FLAT] = TeachRunOptions()


_CIFAR = {
    "teacher_model": "resnet56",
    "student": "resnet20",
    "epochs": 240,
    "batch_size": 64,
    "lr": 0.05,
    "schedule": "steps",
    "milestones": (150, 180, 210),
}
_PHOTOGRAPHS = {
    "teacher_model": "resnet50",
    "student": "resnet18",
    "optimizer": "sgd",
    "lr": 0.1,
    "nesterov": True,
    "weight_decay": 5e-5,
    "schedule": "cosine",
    "warmup": 2,
    "epochs": 60,
    "batch_size": 64,
}

# what suits each data set
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
        "batch_size": 64,
    },
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "tiny-imagenet": {**_CIFAR, "teacher_model": "resnet34_cifar", "student": "resnet18_cifar"},
    "imagenette": _PHOTOGRAPHS,
    "folder": _PHOTOGRAPHS,
}


def defaults(recipe: Any, preset: str, dataset: str | None) -> "Distill[Any]":
    """The configuration of a recipe's preset on a data set (None: the preset's, else digits), before the command line.

    Raises:
        ValueError: there is no such preset.
    """
    if preset not in recipe.presets:
        raise ValueError(f"preset must be one of {', '.join(recipe.presets)} for recipe {recipe.name}, got {preset!r}")
    values = recipe.presets[preset].values
    dataset = dataset or values.get("dataset", "digits")
    suited = defaults_for(dataset)
    if preset not in ("default", "large-batch"):  # a source's training is its own, whole
        suited = {name: suited[name] for name in ("teacher_model", "student", "threads") if name in suited}
    config: Distill[Any] = Distill(recipe=recipe.name, preset=preset, method=recipe.settings())
    return updated(config, {**_for_both(suited), **_for_both(values), "dataset": dataset})


def _for_both(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, and what they say of training for the teacher's training too."""
    training = {f.name for f in fields(Training)}
    return {f"teacher_training.{name}": value for name, value in values.items() if name in training} | dict(values)


def teach_defaults(dataset: str | None) -> Teach:
    """The configuration of `kdfast teacher` on a data set, before the command line."""
    chosen = defaults_for(dataset or "digits")
    values = {k: v for k, v in chosen.items() if k not in ("teacher_model", "student", "label_fraction", "seeds")}
    return updated(Teach(model=chosen["teacher_model"]), {**values, "dataset": dataset or "digits"})


def defaults_for(dataset: str) -> Mapping[str, Any]:
    """What suits a data set; a path is an image folder."""
    return DATASETS.get(dataset, DATASETS["folder"])


def updated(config: C, values: Mapping[str, Any]) -> C:
    """`config` with each value put into the field of its name, wherever that is.

    Raises:
        ValueError: a name that no field has, or a value that a field refuses.
    """
    own: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        part, _, rest = name.rpartition(".")
        part = part or _home(config, name)
        if part:
            parts.setdefault(part, {})[rest] = value
        else:
            own[name] = value
    for part, inner in parts.items():
        own[part] = updated(getattr(config, part), inner)
    return replace(config, **own)  # type: ignore[type-var]


def _home(config: Any, name: str) -> str:
    """The part of config that has a field of this name: "" for itself, first found wins; teacher_training only by its full name."""
    if any(f.name == name for f in fields(config)):
        return ""
    for f in fields(config):
        part = getattr(config, f.name)
        if f.name != "teacher_training" and is_dataclass(part) and any(inner.name == name for inner in fields(part)):
            return f.name
    raise ValueError(f"there is no option {name!r}")


def parse_options(options: tuple[str, ...], name: str) -> dict[str, Any]:
    """("shortcut=A", "width=2") -> {"shortcut": "A", "width": 2}.

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


# ---- config.toml -----------------------------------------------------------------------------------------------------


def to_toml(config: Any) -> str:
    """The configuration as TOML; None is written as an empty string."""
    return tomlkit.dumps(_plain(config))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        inner = {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
        simple_first = sorted(inner.items(), key=lambda item: isinstance(item[1], dict))  # TOML wants tables last
        return {k: "" if v is None else v for k, v in simple_first}
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def with_epochs(table: Mapping[str, Any], given: Mapping[str, str | None]) -> Mapping[str, Any]:
    """A config.toml's table with the command line's epochs in it: filled() then cuts a warm-up that nobody asked for to fit them.

    Args:
        table: empty where there is no config.toml.
        given: the command line's text of epochs, warmup, teacher_training.epochs and teacher_training.warmup, as far as they are there.
            What is no number is left to the parser.
    """
    for part, prefix in (("training", ""), ("teacher_training", "teacher_training.")):
        epochs = given.get(f"{prefix}epochs") or ""
        if epochs.isdecimal() and int(epochs) > 0 and given.get(f"{prefix}warmup") is None:
            table = {**table, part: {**table.get(part, {}), "epochs": int(epochs)}}
    return table


def of_run(folder: Path) -> Path:
    """The config.toml of the run in a folder.

    Raises:
        ValueError: there is no run in it.
    """
    path = folder / "config.toml"
    if not path.is_file():
        what = "holds no run" if folder.is_dir() else "is no folder"
        raise ValueError(f"--resume: {folder} {what}, so there is nothing to continue; without --resume a run begins there")
    return path


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a config.toml.

    Raises:
        ValueError: it cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is no configuration: there is no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is no configuration: {error}") from None


def filled(config: C, table: Mapping[str, Any], source: str) -> C:
    """`config` with the values of a config.toml's table over its own; an empty string is None where the field may be.

    Raises:
        ValueError: a key that no field has, or a value of another type; `source` names the table.
    """
    hints = get_type_hints(type(config))
    known = {f.name for f in fields(config)}  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise ValueError(f"{source}: there is no option {key!r}; known are {', '.join(sorted(known))}")
    values: dict[str, Any] = {}
    for name in known:
        part = getattr(config, name)
        if is_dataclass(part):
            values[name] = filled(part, table.get(name, {}), f"{source} [{name}]")
        elif name in table:
            values[name] = _converted(table[name], hints[name], f"{source}: {name}")
    if isinstance(config, Training) and "epochs" in table and "warmup" not in table:  # what suits 60 epochs may be too long for one
        values["warmup"] = min(config.warmup, max(0, values["epochs"] - 1))
    return replace(config, **values)  # type: ignore[type-var]


def _converted(value: Any, hint: Any, what: str) -> Any:
    """A TOML value as the type that the field has."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _converted(value, get_args(hint)[0], what)
    if origin in (Union, UnionType) and value == "":
        return None
    if origin in (Union, UnionType):
        return _converted(value, next(a for a in get_args(hint) if a is not type(None)), what)
    if origin is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{what} must be one of {', '.join(map(str, get_args(hint)))}, got {value!r}")
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_converted(v, get_args(hint)[0], what) for v in value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise ValueError(f"{what} must be {getattr(hint, '__name__', hint)}, got {value!r}")


def foreign(folder: Path, found: Sequence[str]) -> str:
    """Why a run folder cannot be taken; `found` is what differences() says."""
    return f"run folder {folder} belongs to another configuration: {'; '.join(found[:5])}; give --out another folder"


def differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """What two configurations disagree on, "option: ours here, theirs there", the options that may change on resume left out."""
    found = []
    for f in fields(ours):
        a, b = getattr(ours, f.name), getattr(theirs, f.name)
        if is_dataclass(a):
            found += differences(a, b, "teacher_training." if f.name == "teacher_training" else prefix)
        elif f.name not in FREE_ON_RESUME and a != b:
            found.append(f"{prefix}{f.name} is {b} there and {a} here")
    return found

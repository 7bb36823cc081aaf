"""kdfast eval: top-1, top-5, loss and confusion matrix of a trained classifier on a split."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from kdfast import files
from kdfast.commands import config
from kdfast.commands.config import FLAT, DataOptions, unsaid
from kdfast.commands.session import load_data
from kdfast.data import make_loaders
from kdfast.engine import Evaluation, evaluate, join
from kdfast.models import parameter_count
from kdfast.runs import artifact

MATRIX_CLASSES = 25  # more do not fit a terminal
RUNS = unsaid("the run's")


@dataclass(frozen=True)
class Images:
    """Which images, and how they are shown; what is not given is as in the run's training, else as usual."""

    dataset: Annotated[str | None, RUNS] = None
    """Data set by name (kdfast list datasets), or the path of an image folder."""
    data_dir: Annotated[Path | None, RUNS] = None
    """Where the data set is, or is downloaded to."""
    val_fraction: Annotated[float | None, RUNS] = None
    """Part of the training images that is set aside for validation."""
    max_images: Annotated[int | None, RUNS] = None
    """At most so many training images, the same share of every class."""
    max_bad_files: Annotated[int | None, RUNS] = None
    """Leave out up to so many image files that cannot be read."""
    image_size: Annotated[int | None, RUNS] = None
    """Pixels."""
    evaluation: Annotated[str | None, RUNS] = None
    """How images are sized: squash, center-crop, or none: as they are."""
    normalization: Annotated[str | None, unsaid("the run's, else the weights' own")] = None
    """Mean and deviation by name: imagenet, cifar10, ..."""
    loader: Annotated[Literal["auto", "dali", "resident", "torchvision"] | None, RUNS] = None
    """Where images come from; auto: on the device if they fit there, else DALI where installed, else torchvision."""
    workers: Annotated[int | None, RUNS] = None
    """Loader processes (torchvision) or threads (dali)."""


@dataclass(frozen=True)
class Eval:
    """Evaluate a trained classifier."""

    weights: Annotated[str, tyro.conf.Positional]
    """A run folder or a weights file."""
    model: str | None = None
    """Architecture of a weights file that does not name its own."""
    model_options: tuple[str, ...] = ()
    """Options of that architecture, key=value (shortcut=A); most are seen from the weights."""
    split: Literal["test", "val", "train"] = "test"
    """Which images."""
    batch_size: int = 256
    """Images a forward pass."""
    seed: int | None = None
    """Of the split into training, validation and test images, where the data set has none of its own; none: the run's, else 0."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: Path | None = None
    """Also write the numbers to this file."""
    data: Annotated[Images, FLAT] = Images()


def run_eval(options: Eval) -> Evaluation:
    """Evaluates, prints and returns the numbers.

    Raises:
        ValueError: weights, data or options that cannot be used.
    """
    console = Console(soft_wrap=True)
    if options.json is not None:
        files.check_writable(options.json, "--json")
    artifact.find(options.weights)
    data_options, seed = _as_trained(Path(options.weights) / "config.toml", options.data, options.seed)
    if not data_options.dataset:
        raise ValueError("dataset is not known: name it with --dataset")
    world = join(options.device)
    data, _ = load_data(data_options, seed, world, console)
    given = config.parse_options(options.model_options, "model_options")
    loaded = artifact.load(options.weights, model=options.model, options=given)
    if loaded.classes is not None and loaded.classes != data.classes:
        raise ValueError(f"{loaded.path} was trained on other classes, or in another order, than {data.name}'s")
    mean, std = data.mean, data.std
    if data_options.normalization is not None:
        mean, std = artifact.statistics(data_options.normalization)
    elif loaded.normalization is not None:
        mean, std = loaded.normalization
    prepared = loaded.preparation
    loaders = make_loaders(
        replace(data, mean=mean, std=std, test=getattr(data, options.split)),
        batch_size=options.batch_size,
        loader=data_options.loader,
        eval_transform=data_options.evaluation or (prepared.evaluation if prepared else None),
        image_size=data_options.image_size or (prepared.image_size if prepared else None),
        workers=data_options.workers,
        device=world.device,
        rank=world.rank,
        world_size=world.size,
        channels_last=True,
    )
    model = loaded.model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    result = evaluate(model, loaders.test, data.classes, world)
    if world.main:
        _print(console, loaded.spec.name, parameter_count(model), data.name, options.split, data.classes, result)
        if options.json is not None:
            files.write_json(options.json, asdict(result))
    world.close()
    return result


def _as_trained(path: Path, given: Images, seed: int | None) -> tuple[DataOptions, int]:
    """The data options and the seed of the run whose config.toml this is, where it is one's, with what was given over them."""
    theirs, theirs_seed = DataOptions(dataset=""), 0
    if path.exists():
        table = config.read_toml(path)
        theirs, theirs_seed = config.filled(DataOptions(), table.get("data", {}), str(path)), table.get("run", {}).get("seed", 0)
    changed = {name: value for name, value in asdict(given).items() if value is not None}
    return replace(theirs, **changed), theirs_seed if seed is None else seed


def _print(console: Console, model: str, parameters: int, dataset: str, split: str, classes: tuple[str, ...], result: Evaluation) -> None:
    console.print(f"{model} ({parameters:,} parameters) on {dataset} {split}, {result.images:,} images", highlight=False)
    console.print(
        f"top-1 {100 * result.top1:.2f} %   top-5 {100 * result.top5:.2f} %   loss {result.loss:.4f}   {result.images_per_s:,.0f} images/s",
        highlight=False,
    )
    if len(classes) > MATRIX_CLASSES:
        return
    table = Table(box=box.SIMPLE_HEAD, title="rows: true class, columns: predicted", title_justify="left", title_style="dim")
    table.add_column("")
    for k in range(len(classes)):
        table.add_column(str(k), justify="right")
    for k, (name, row) in enumerate(zip(classes, result.confusion)):
        table.add_row(f"{k} {name}", *(f"[bold]{n}[/bold]" if k == j else (str(n) if n else "·") for j, n in enumerate(row)))
    console.print(table)

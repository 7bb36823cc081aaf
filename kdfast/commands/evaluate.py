"""kdfast eval: top-1, top-5, loss and confusion matrix of a trained classifier on a split."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

from kdfast import files
from kdfast.commands import toml
from kdfast.commands.command_line import parse
from kdfast.commands.config import FLAT, DataOptions, default_is, parse_options
from kdfast.commands.images import load_data
from kdfast.commands.tables import make_table
from kdfast.data import make_loaders
from kdfast.data.loaders import LoaderName
from kdfast.engine import Evaluation, evaluate, join
from kdfast.models import parameter_count
from kdfast.report.confusion import MATRIX_CLASSES
from kdfast.runs import artifact
from kdfast.text import percent

RUNS = default_is("the run's")


@dataclass(frozen=True)
class Images:
    """The images and their preparation; an option without a value is as in the run's training, else the usual one."""

    dataset: Annotated[str | None, RUNS] = None
    """Data set by name (kdfast list datasets), or the path of an image folder."""
    data_dir: Annotated[Path | None, RUNS] = None
    """Folder that holds the data set, or that it is downloaded to."""
    val_fraction: Annotated[float | None, RUNS] = None
    """Fraction of the training images set aside for validation."""
    max_images: Annotated[int | None, RUNS] = None
    """Use at most this many training images, the same fraction of every class."""
    max_bad_files: Annotated[int | None, RUNS] = None
    """Leave out up to this many image files that cannot be read."""
    image_size: Annotated[int | None, RUNS] = None
    """Side of the square input in pixels."""
    evaluation: Annotated[str | None, RUNS] = None
    """Resizing: squash, center-crop, or "none" for images that have the size already."""
    normalization: Annotated[str | None, default_is("the run's, else the weights' own")] = None
    """Mean and standard deviation of the channels, by name: imagenet, cifar10, ..."""
    loader: Annotated[LoaderName | None, RUNS] = None
    """Image loader; auto: resident if the images fit on the device, else dali if it is installed, else torchvision."""
    workers: Annotated[int | None, RUNS] = None
    """Processes (torchvision) or threads (dali) of the loader."""


@dataclass(frozen=True)
class Eval:
    """Evaluate a trained classifier."""

    weights: Annotated[str, tyro.conf.Positional]
    """A run folder or a weights file."""
    model: str | None = None
    """Architecture of a weights file that does not name its own."""
    model_options: tuple[str, ...] = ()
    """Options of that architecture, as key=value (shortcut=A); most are recognized from the weights."""
    split: Literal["test", "val", "train"] = "test"
    """Images to evaluate on."""
    batch_size: int = 256
    """Images in one forward pass."""
    seed: int | None = None
    """Seed of the split into training, validation and test images, for data sets without a split of their own; none: the run's, else 0."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:N."""
    json: Path | None = None
    """Also write the numbers to this file."""
    data: Annotated[Images, FLAT] = Images()


def run(arguments: Sequence[str]) -> None:
    """Runs the command."""
    run_eval(parse(Eval, arguments, "eval"))


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
    given = parse_options(options.model_options, "model_options")
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
    """The data options and the seed of a run's config.toml (the usual ones if there is no such file), with the given ones over them."""
    theirs, theirs_seed = DataOptions(dataset=""), 0
    if path.exists():
        table = toml.read(path)
        theirs, theirs_seed = toml.fill(DataOptions(), table.get("data", {}), str(path)), table.get("run", {}).get("seed", 0)
    changed = {name: value for name, value in asdict(given).items() if value is not None}
    return replace(theirs, **changed), theirs_seed if seed is None else seed


def _print(console: Console, model: str, parameters: int, dataset: str, split: str, classes: tuple[str, ...], result: Evaluation) -> None:
    console.print(f"{model} ({parameters:,} parameters) on {dataset} {split}, {result.images:,} images", highlight=False)
    console.print(
        f"top-1 {percent(result.top1)} %   top-5 {percent(result.top5)} %   loss {result.loss:.4f}   {result.images_per_s:,.0f} images/s",
        highlight=False,
    )
    if len(classes) > MATRIX_CLASSES:
        return
    rows = [
        (f"{k} {name}", *(f"[bold]{n}[/bold]" if k == j else (str(n) if n else "·") for j, n in enumerate(row)))
        for k, (name, row) in enumerate(zip(classes, result.confusion))
    ]
    console.print("rows: true class, columns: predicted", style="dim")
    console.print(make_table(["", *map(str, range(len(classes)))], rows))

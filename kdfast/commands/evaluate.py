"""kdfast eval: top-1, top-5, loss and confusion matrix of a trained classifier on a split."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from kdfast import files
from kdfast.commands import artifact, config
from kdfast.commands.config import FLAT, Absent, DataOptions, unsaid
from kdfast.commands.session import load_data
from kdfast.data import make_loaders
from kdfast.engine import Evaluation, evaluate, join
from kdfast.models import parameter_count

MATRIX_CLASSES = 25  # more do not fit a terminal


@dataclass(frozen=True)
class EvalData(DataOptions):
    """Which images, and how they are shown."""

    dataset: Annotated[str, unsaid("the run's")] = ""
    """Data set by name (kdfast list datasets), or the path of an image folder."""
    # of training
    augment: Absent[str | None] = None
    label_fraction: Absent[float] = 1.0


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
    seed: int = 0
    """Of the split into training, validation and test images, where the data set has none of its own."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: Path | None = None
    """Also write the numbers to this file."""
    data: Annotated[EvalData, FLAT] = EvalData()


def run_eval(options: Eval) -> Evaluation:
    """Evaluates, prints and returns the numbers.

    Raises:
        ValueError: weights, data or options that cannot be used.
    """
    console = Console(soft_wrap=True)
    if options.json is not None:
        files.check_writable(options.json, "--json")
    artifact.find(options.weights)
    data_options: DataOptions = options.data
    seed = options.seed
    remembered = Path(options.weights) / "config.toml"
    if remembered.exists():
        data_options, seed = _as_trained(remembered, data_options, seed)
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


def _as_trained(path: Path, given: DataOptions, seed: int) -> tuple[DataOptions, int]:
    """The data options of the run, with what was given now over them."""
    table = config.read_toml(path)
    theirs = config.filled(DataOptions(), table.get("data", {}), str(path))
    changed = {f.name: getattr(given, f.name) for f in fields(given) if getattr(given, f.name) != getattr(EvalData(), f.name)}
    return replace(theirs, **changed), table.get("run", {}).get("seed", seed)


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

"""kdfast eval: top-1, top-5, loss and confusion matrix of a trained classifier on a split."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from kdfast import files
from kdfast.commands import toml
from kdfast.commands.command_line import parse
from kdfast.commands.config import FLAT, Absent, DataOptions, default_is, parse_options
from kdfast.commands.images import load_data, preparation
from kdfast.commands.rehearsal import check_fits
from kdfast.commands.tables import make_table
from kdfast.data import make_loaders
from kdfast.engine import Evaluation, evaluate, join
from kdfast.engine.ranges import AtLeastOne, Checked, Seed
from kdfast.engine.terminal import Terminal
from kdfast.models import parameter_count
from kdfast.report.confusion import MATRIX_CLASSES
from kdfast.runs import artifact
from kdfast.runs.summary import describe_chance
from kdfast.text import percent

RUNS = default_is("the run's")


@dataclass(frozen=True)
class EvalData(DataOptions):
    """The images and their preparation. An option that is not given is as in the run's config.toml, else as shown."""

    dataset: Annotated[str, RUNS] = ""
    """Data set by name (kdfast list datasets), or the path of an image folder."""
    # training alone has these options
    label_fraction: Absent[float] = 1.0
    augment: Absent[str | None] = None


@dataclass(frozen=True)
class Eval(Checked):
    """Evaluate a trained classifier."""

    weights: Annotated[str, tyro.conf.Positional]
    """A run folder or a weights file."""
    model: str | None = None
    """Architecture of a weights file that does not name its own."""
    model_options: tuple[str, ...] = ()
    """Options of that architecture, as key=value (shortcut=A); most are recognized from the weights."""
    split: Literal["test", "val", "train"] = "test"
    """Images to evaluate on."""
    batch_size: AtLeastOne = 256
    """Images in one forward pass."""
    seed: Annotated[Seed, default_is("the run's, else 0")] = 0
    """Seed of the split into training, validation and test images, for data sets without a split of their own."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:N."""
    json: Path | None = None
    """Also write the numbers to this file."""
    data: Annotated[EvalData, FLAT] = EvalData()


def run(arguments: Sequence[str]) -> None:
    """Runs the command."""
    weights = parse(Eval, arguments, "eval").weights
    run_eval(parse(Eval, arguments, "eval", default=as_trained(weights)))


def as_trained(weights: str) -> Eval:
    """Returns the options that evaluate a run on the images of its training; the usual ones if `weights` is not a run folder."""
    path = Path(weights) / "config.toml"
    table = toml.read(path, sealed=True) if path.exists() else {}
    return Eval(weights, seed=table.get("run", {}).get("seed", 0), data=toml.fill(EvalData(), table.get("data", {}), str(path)))


def run_eval(options: Eval) -> Evaluation:
    """Evaluates, prints and returns the numbers.

    Raises:
        ValueError: weights, data or options that cannot be used.
    """
    console = Terminal()
    if options.json is not None:
        files.check_writable(options.json, "--json")
    artifact.find(options.weights)
    asked = options.data
    if not asked.dataset:
        raise ValueError("dataset is not known: name it with --dataset")
    world = join(options.device)
    data, _ = load_data(asked, options.seed, world, console)
    given = parse_options(options.model_options, "model_options")
    loaded = artifact.load(options.weights, model=options.model, options=given)
    artifact.check_classes(loaded, data.classes, data.name)
    prepared = preparation(data, asked)
    if asked.normalization is None and loaded.normalization is not None:
        prepared = replace(prepared, mean=loaded.normalization[0], std=loaded.normalization[1])
    if trained := loaded.preparation:
        image_size, evaluation = asked.image_size or trained.image_size, asked.evaluation or trained.evaluation
        prepared = replace(prepared, image_size=image_size, evaluation=evaluation)
    check_fits(loaded.model, str(loaded.path), prepared.image_size, len(data.classes))
    loaders = make_loaders(
        replace(data, mean=prepared.mean, std=prepared.std, test=getattr(data, options.split)),
        batch_size=options.batch_size,
        loader=asked.loader,
        eval_transform=prepared.evaluation,
        image_size=prepared.image_size,
        workers=asked.workers,
        device=world.device,
        rank=world.rank,
        world_size=world.size,
        channels_last=True,
    )
    model = loaded.model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    result = evaluate(model, loaders.test, data.classes, world)
    if not math.isfinite(result.loss):
        raise ValueError(f"{loaded.path}: the loss on {result.images:,} images is {result.loss}: the network's outputs are not finite")
    if world.main:
        for told in artifact.compare_images(loaded, prepared):
            console.print(f"note: {told}")
        _print(console, loaded.spec.name, parameter_count(model), data.name, options.split, data.classes, result)
        if chance := describe_chance(result.confusion, data.classes):
            console.print(f"warning: this is {chance}")
        if options.json is not None:
            files.write_json(options.json, asdict(result))
    world.close()
    return result


def _print(console: Terminal, model: str, parameters: int, dataset: str, split: str, classes: tuple[str, ...], result: Evaluation) -> None:
    console.print(f"{model} ({parameters:,} parameters) on {dataset} {split}, {result.images:,} images")
    console.print(
        f"top-1 {percent(result.top1)} %   top-5 {percent(result.top5)} %   loss {result.loss:.4f}   {result.images_per_s:,.0f} images/s",
    )
    if len(classes) > MATRIX_CLASSES:
        return
    rows = [(f"{k} {name}", *map(str, row)) for k, (name, row) in enumerate(zip(classes, result.confusion))]
    console.print("rows: true class, columns: predicted", style="dim")
    console.print(make_table(["", *map(str, range(len(classes)))], rows))

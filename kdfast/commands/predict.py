"""kdfast predict: the most likely classes of image files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from kdfast.commands.command_line import parse
from kdfast.commands.tables import make_table
from kdfast.data import DataError, evaluation_transform
from kdfast.data.images import EXTENSIONS, decode, describe_others, find
from kdfast.engine import join
from kdfast.engine.ranges import AtLeastOne, Checked
from kdfast.engine.terminal import Terminal
from kdfast.runs import artifact
from kdfast.text import percent


@dataclass(frozen=True)
class Predict(Checked):
    """Classify image files."""

    weights: Annotated[str, tyro.conf.Positional]
    """A run folder or a weights file that this library wrote."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, or folders of them. They are read as they are stored: no orientation tag (EXIF) turns them, in training neither."""
    model: str | None = None
    """Architecture, if it is your own: package.module:function."""
    top: AtLeastOne = 3
    """Number of classes to show for each image."""
    batch_size: AtLeastOne = 64
    """Images in one forward pass."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:N."""


def run(arguments: Sequence[str]) -> None:
    """Runs the command."""
    predict(parse(Predict, arguments, "predict"))


@torch.no_grad()
def predict(options: Predict) -> dict[Path, list[tuple[str, float]]]:
    """Prints and returns the most likely classes of each image with their probabilities, best first.

    Raises:
        ValueError: weights that do not say how images are prepared, or no images.
        DataError: some of the files cannot be read as images; the answers for all others have been printed.
    """
    loaded = artifact.load(options.weights, model=options.model, otherwise="predict needs weights that kdfast wrote")
    if loaded.preparation is None or loaded.classes is None:
        raise ValueError(f"{loaded.path} does not say which classes it knows: predict needs weights that kdfast wrote")
    if not options.images:
        raise ValueError("images: name image files or folders after the run, got none")
    paths = [path for given in options.images for path in _files(given)]
    if not paths:
        raise ValueError(f"no images in {', '.join(map(str, options.images))}; known endings: {', '.join(EXTENSIONS)}")
    prepared, device = loaded.preparation, join(options.device).device
    transform = evaluation_transform(prepared.evaluation, prepared.image_size, prepared.mean, prepared.std)
    model = loaded.model.to(device)
    answers: dict[Path, list[tuple[str, float]]] = {}
    bad: list[str] = []
    for start in range(0, len(paths), options.batch_size):
        chunk, inputs = [], []
        for path in paths[start : start + options.batch_size]:
            try:
                inputs.append(transform(decode(str(path))))
                chunk.append(path)
            except DataError as error:
                bad.append(str(error))
        if not chunk:
            continue
        if len({image.shape for image in inputs}) > 1:
            raise DataError(
                "images differ in size, and these weights were trained with evaluation none, which resizes no image: resize them"
            )
        images = torch.stack(inputs)
        best = model(images.to(device)).float().softmax(dim=1).topk(min(options.top, len(loaded.classes)), dim=1)
        for path, values, indices in zip(chunk, best.values.tolist(), best.indices.tolist()):
            answers[path] = [(loaded.classes[k], value) for k, value in zip(indices, values)]
    if answers:
        _print(answers)
    if bad:
        raise DataError(f"{len(bad):,} of {len(paths):,} images cannot be read: {'; '.join(bad)}")
    return answers


def _files(given: Path) -> list[Path]:
    if given.is_dir():
        found = find(given)
        if found.others:
            Terminal().print(describe_others(given, found.others))
        return [Path(path) for path in found.images]
    return [given]


def _print(answers: dict[Path, list[tuple[str, float]]]) -> None:
    places = len(next(iter(answers.values())))
    columns = ["image", "most likely", *(f"{k}." for k in range(2, places + 1))]
    rows = [(str(path), *(f"{name} {percent(probability, 1)} %" for name, probability in best)) for path, best in answers.items()]
    Terminal(soft_wrap=False).print(make_table(columns, rows, left=len(columns)))

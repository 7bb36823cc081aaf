"""A trained classifier as a file: weights, with the architecture, the classes and the preparation of images in the header."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.data import NORMALIZATIONS
from kdfast.models import ModelSpec, build, load_weights, read_weights, recognize, save_weights
from kdfast.models.zoo import NETWORKS
from kdfast.runs import results

# one key, since a safetensors header keeps no order and the same weights should be the same bytes
METADATA = "kdfast"

SMALL = 64  # pixels; networks for images up to this size have other strides than torchvision's

Channels = tuple[float, float, float]
Statistics = tuple[Channels, Channels]  # mean and standard deviation of each channel, pixels scaled to 0..1


@dataclass(frozen=True)
class Preparation:
    """The way from an image to the network's input."""

    mean: Channels
    std: Channels
    image_size: int
    evaluation: str


@dataclass(frozen=True)
class Classifier:
    """A network in eval mode, and the content of its file.

    Attributes:
        model: the network.
        spec: its architecture.
        classes: names of the classes; None if the file does not have them.
        preparation: of its images; None if the file does not have it.
        normalization: mean and deviation that its weights expect, if they are known.
        path: of the file.
        facts: this library's part of the file's header; {} without one.
        state: the file's tensors.
    """

    model: nn.Module
    spec: ModelSpec
    classes: tuple[str, ...] | None
    preparation: Preparation | None
    normalization: Statistics | None
    path: Path
    facts: Mapping[str, Any]
    state: Mapping[str, Tensor]


def statistics(name: str) -> Statistics:
    """Returns mean and standard deviation of a normalization by name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {name!r}")
    return NORMALIZATIONS[name]


def save(
    path: Path, state: Mapping[str, Tensor], spec: ModelSpec, classes: tuple[str, ...], preparation: Preparation, **extra: str
) -> None:
    """Writes weights atomically, with everything else in the file's header.

    `extra` goes into the header too: a name in it says that the tensors NAME.* belong to a recipe and not to the network.
    """
    facts = {"spec": spec.to_json(), "classes": classes, "preparation": vars(preparation), **extra}
    save_weights(state, path, {METADATA: json.dumps(facts)})


def find(run_or_weights: str | Path) -> Path:
    """Returns the weights file of a run folder, or the path itself if it is a file.

    Raises:
        ValueError: there is none, or it is not the run's.
    """
    path = Path(run_or_weights)
    if path.is_dir():
        weights = path / "best.safetensors"
        if not weights.exists():
            state = "has not finished yet" if (path / "config.toml").exists() else "is not a run folder"
            raise ValueError(f"{path} {state}: there is no {weights.name} in it")
        results.check(path, weights.name)
        return weights
    if not path.exists():
        raise ValueError(f"{path} is neither a run folder nor a weights file: there is no such path")
    return path


def load(
    run_or_weights: str | Path,
    *,
    model: str | None = None,
    options: Mapping[str, str | int | float | bool] | None = None,
    option: str = "--model",
    otherwise: str = "",
) -> Classifier:
    """Loads a classifier. A file imports nothing: a network outside kdfast and torchvision is built only if `model` names it too.

    Args:
        run_or_weights: a run folder, a file that this library wrote, or another weights file.
        model: architecture of another weights file. A file of this library names its own; only "package.module:function" is compared.
        options: of that architecture, over the options that the weights' names and shapes show.
        option: of the command line that gives `model`, for errors.
        otherwise: advice in place of that option where neither the file nor `model` names the architecture.

    Raises:
        ValueError: no such file, a damaged header, no architecture known, a network that `model` would have to name, or weights of another
            architecture (the names are listed).
    """
    path = find(run_or_weights)
    state, metadata = read_weights(path)
    normalization: Statistics | None = None
    classes, preparation = None, None
    facts: dict[str, Any] = {}
    if METADATA in metadata:
        facts, spec, classes, preparation = _read_header(path, metadata[METADATA])
        normalization = preparation.mean, preparation.std
        if ":" in spec.name and spec.name != model:
            raise ValueError(f"{path} is of {spec.name}, which is not kdfast's: files import nothing, so name it with {option} {spec.name}")
    else:
        if model is None:
            raise ValueError(f"{path} does not say which architecture it is of: {otherwise or f'name it with {option}'}")
        spec, expected = recognize(state, model)
        if expected is not None:
            normalization = NORMALIZATIONS[expected]
        spec = replace(spec, options={**spec.options, **(options or {})})
    network = build(spec)
    extra = tuple(f"{name}." for name in facts if name not in ("spec", "classes", "preparation"))  # tensors of a recipe's own parts
    own = {name: value for name, value in state.items() if not name.startswith(extra)}
    load_weights(network, own if extra else path)  # by its path, so that a mismatch names the file
    return Classifier(network.eval(), spec, classes, preparation, normalization, path, facts, state)


def check_classes(loaded: Classifier, classes: tuple[str, ...], dataset: str) -> None:
    """Checks that a classifier knows the classes of a data set, in their order; a file without names is believed.

    Raises:
        ValueError: the number, the names or the order differ.
    """
    if loaded.spec.num_classes != len(classes):
        raise ValueError(f"{loaded.path} has {loaded.spec.num_classes} classes, but {dataset} has {len(classes)}")
    for k, (there, here) in enumerate(zip(loaded.classes or classes, classes)):
        if there != here:
            kind = "the same classes in another order" if sorted(loaded.classes or ()) == sorted(classes) else "other classes"
            raise ValueError(f"{loaded.path} was trained on {kind} than {dataset}'s: class {k} is {there!r} there and {here!r} here")


def compare_images(loaded: Classifier, used: Preparation) -> list[str]:
    """Says in sentences how the images differ from those that a classifier was trained on, with both values."""
    before, path, size = loaded.preparation, loaded.path, used.image_size
    told = []
    if before is not None:
        pairs = (("an image size of", before.image_size, size), ("the resizing", before.evaluation, used.evaluation))
        told = [f"{path} was trained with {what} {there}, and here it is {here}" for what, there, here in pairs if there != here]
    elif loaded.spec.name not in NETWORKS and ":" not in loaded.spec.name and size <= SMALL:
        told.append(
            f"{path}: {loaded.spec.name} is made for images of 224 pixels, and here they have {size}. A network for small images can have "
            "the same names and shapes and other strides; then the answers are wrong: check the accuracy"
        )
    there, here = loaded.normalization, (used.mean, used.std)
    if there is not None and there != here:
        told.append(f"{path} was trained with normalization by {_describe(there)}, and here it is by {_describe(here)}")
    return told


def _read_header(path: Path, text: str) -> tuple[dict[str, Any], ModelSpec, tuple[str, ...], Preparation]:
    """This library's part of a file's header, as `save` wrote it."""
    try:
        facts = json.loads(text)
        known = facts["preparation"]
        preparation = Preparation(tuple(known["mean"]), tuple(known["std"]), int(known["image_size"]), str(known["evaluation"]))
        return facts, ModelSpec.from_json(facts["spec"]), tuple(map(str, facts["classes"])), preparation
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has a damaged header: {error}") from error


def _describe(normalization: Statistics) -> str:
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in normalization)
    return f"mean {mean} and deviation {std}"


class Renormalized(nn.Module):
    """A network for images that were normalized differently: x * scale + shift replaces one normalization by the other.

    Args:
        model: expects images normalized by `expected`.
        given: mean and deviation that the images were normalized by.
        expected: mean and deviation of the model's training.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, given: Statistics, expected: Statistics):
        super().__init__()
        self.model = model
        (mean, std), (own_mean, own_std) = (tuple(torch.tensor(v).view(1, -1, 1, 1) for v in pair) for pair in (given, expected))
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the model's output."""
        return self.model(images * self.scale + self.shift)

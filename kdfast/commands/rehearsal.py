"""A run without its trainings: what does not fit together is found at once, not after the teacher's training."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from kdfast.data import Batch
from kdfast.engine import StageResult
from kdfast.recipes.recipe import Stages
from kdfast.runs.results import Kept

T = TypeVar("T")


@dataclass(frozen=True)
class _Untrained(StageResult):
    """The result of a stage that was not trained."""

    def restore(self, which: Kept) -> None:
        """Does nothing: there is no file."""


@torch.no_grad()
def check_fits(model: nn.Module, name: str, image_size: int, classes: int, *, trained: bool = False) -> None:
    """Checks that a network takes images of this size and gives one finite logit a class.

    Args:
        model: the network, on any device, on the meta device too; its training flags are left in evaluation mode.
        name: of the network, for messages: "student resnet8".
        image_size: pixels.
        classes: number of classes.
        trained: also try the training mode, where auxiliary classifiers (Inception) need larger images.

    Raises:
        ValueError: it does not.
    """
    device = next(model.parameters(), torch.empty(0)).device
    try:
        if trained:
            before = [buffer.clone() for buffer in model.buffers()]
            model.train()(torch.zeros(2, 3, image_size, image_size, device=device))
            for buffer, value in zip(model.buffers(), before):
                buffer.copy_(value)
        logits = model.eval()(torch.zeros(2, 3, image_size, image_size, device=device))
    except Exception as error:  # another's network raises what it likes
        fault = "" if "must return logits" in str(error) else f" takes no images of {image_size} x {image_size} pixels"
        raise ValueError(f"{name}{fault}: {_first_line(error)}") from error
    if logits.shape != (2, classes):
        raise ValueError(f"{name} must give one logit a class, {classes} for an image, got outputs of shape {tuple(logits.shape)} for 2")
    if not logits.is_meta and not logits.isfinite().all():
        raise ValueError(f"{name} gives logits that are not finite (NaN or infinite) for a black image: its weights are damaged")


@torch.no_grad()
def rehearse(stages: Stages[T], image_size: int, classes: int, processes: int) -> T:
    """Returns the outcome of a recipe's stages without training them: each computes its loss on two images, in evaluation mode.

    A stage that is to train with single images in a forward pass takes one, in training mode: its networks change.

    Raises:
        ValueError: a stage cannot be computed.
    """
    labels = torch.arange(2) % classes
    batch = Batch(torch.randn(2, 3, image_size, image_size), labels, labels)
    result: StageResult | None = None
    while True:
        try:
            stage = stages.send(result) if result is not None else next(stages)
            stage.set_modes(training=False)
            stage.loss(stage.forward(batch), batch)
            images = min(stage.training.batch_size, len(stage.data.train.labels)) // processes
            if 1 in stage.training.split_batch(images, processes):
                stage.set_modes(training=True)
                stage.forward(Batch(*(part[:1] for part in batch)))
        except StopIteration as end:
            return end.value
        except ValueError as error:
            if "Expected more than 1" not in str(error):  # PyTorch's normalizations say so
                raise
            cause = "some forward passes have one image, of which BatchNorm's map here is 1 x 1 and cannot be normalized"
            raise ValueError(f"{cause}: choose another batch_size or micro_batch") from error
        except RuntimeError as error:
            raise ValueError(f"this recipe does not fit these networks and images: {_first_line(error)}") from error
        result = _Untrained(stage.name, 1, 1, defaultdict(float), 0.0, 0.0, stage.keep, Path(), stage.train)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]

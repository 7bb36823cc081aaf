"""A frozen teacher's answers to images that are the same in every epoch, computed once.

Validation images always are; training images are if their augmentation draws nothing (--augment none). Under random augmentation the
teacher sees the student's images and is asked every time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kdfast.data import Batch, Loader, Loaders
from kdfast.engine.distributed import all_processes

LARGEST = 2**28  # bytes that the answers for one split may take on the device


class Remembered:
    """The answers of a frozen network, looked up if they are known.

    Args:
        ask: images [B, 3, H, W] -> answers [B, ...], which do not depend on the batch of an image.
        data: the stage's loaders.
        epochs: of the stage.
    """

    def __init__(self, ask: Callable[[Tensor], Tensor], data: Loaders, epochs: int):
        self._ask, self._data, self._epochs = ask, data, epochs
        self._train: Tensor | None = None
        self._val: Tensor | None = None

    def prepare(self) -> None:
        """Asks about every image once; pass it as a stage's `prepare`.

        A process sees other images in every epoch, so each asks about all of them. That pays if there are more epochs than processes.
        """
        group = all_processes()
        if self._epochs > (1 if group is None else group.size()):
            self._train, self._val = self._answers(self._data.train), self._answers(self._data.val)

    @torch.no_grad()
    def _answers(self, loader: Loader) -> Tensor | None:
        """Returns the answers [n, ...] by index; None: the images change, or the answers are too large."""
        if not loader.deterministic:
            return None
        answers: Tensor | None = None
        for batch in loader.in_order():
            answer = self._ask(batch.images)
            if answers is None:
                if len(loader.labels) * answer[0].nbytes > LARGEST:
                    return None
                answers = answer.new_empty((len(loader.labels), *answer.shape[1:]))
            answers[batch.index] = answer
        return answers

    def __call__(self, batch: Batch, *, training: bool) -> Tensor:
        """Returns the answers [B, ...] to a batch of training images (`training`) or of validation images; without gradient."""
        known = self._train if training else self._val
        if known is not None:
            return known[batch.index]
        with torch.no_grad():
            return self._ask(batch.images)

"""What a frozen teacher says of images that are the same in every epoch, computed once.

Validation images are; training images are where their augmentation draws nothing (--augment none). Under random augmentation the teacher
sees what the student sees, and is asked every time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kdfast.data import Batch, Loader, Loaders
from kdfast.engine.distributed import all_processes

LARGEST = 2**28
"""Bytes that the answers to one split may take on the device."""


class Remembered:
    """A frozen network's answers, looked up where they are known.

    Args:
        says: images [B, 3, H, W] -> [B, ...], the same for an image whatever its batch.
        data: the stage's loaders.
        epochs: of the stage.
    """

    def __init__(self, says: Callable[[Tensor], Tensor], data: Loaders, epochs: int):
        self._says, self._data, self._epochs = says, data, epochs
        self._train: Tensor | None = None
        self._val: Tensor | None = None

    def prepare(self) -> None:
        """Asks once, of every image; a stage's `prepare`.

        On every rank of all images, for which ones it will see changes with the epoch: that pays where there are more epochs than ranks.
        """
        ranks = all_processes()
        if self._epochs > (1 if ranks is None else ranks.size()):
            self._train, self._val = self._answers(self._data.train), self._answers(self._data.val)

    @torch.no_grad()
    def _answers(self, loader: Loader) -> Tensor | None:
        """[n, ...], by index; None: they change, or are too many."""
        if not loader.deterministic:
            return None
        answers: Tensor | None = None
        for batch in loader.in_order():
            said = self._says(batch.images)
            if answers is None:
                if len(loader.labels) * said[0].nbytes > LARGEST:
                    return None
                answers = said.new_empty((len(loader.labels), *said.shape[1:]))
            answers[batch.index] = said
        return answers

    def __call__(self, batch: Batch, *, training: bool) -> Tensor:
        """The answers to a batch [B, ...] of the training images, or of the validation images; without gradient."""
        known = self._train if training else self._val
        if known is not None:
            return known[batch.index]
        with torch.no_grad():
            return self._says(batch.images)

"""Random numbers that depend on their purpose alone: not on order, process or machine."""

import numpy as np
import torch
from torch import Tensor


def mix(*numbers: int) -> int:
    """One well-spread 64-bit seed for a tuple of integers, e.g. (seed, epoch, sample): the finalizer of splitmix64, chained.

    Neighbouring tuples give unrelated seeds; sums or exclusive-ors of their members would not.
    """
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = _mix_arrays(state, np.uint64(number & 0xFFFF_FFFF_FFFF_FFFF))
    return int(state[0])


def make_generator(*numbers: int) -> torch.Generator:
    """A CPU generator seeded by mix(*numbers)."""
    return torch.Generator().manual_seed(mix(*numbers))


class Draws:
    """Uniform random numbers for each of B images, on the CPU, without a generator.

    Draw number k of image i is a function of (key, i, k) alone; the batch that holds the image has no influence.

    Args:
        key: of mix(): the purpose of the numbers.
        index: int64 [B], CPU: the images.
    """

    def __init__(self, *key: int, index: Tensor) -> None:
        self._state = _mix_arrays(np.uint64(mix(*key)), index.numpy().astype(np.uint64))[:, None]
        self._used = 0

    def uniform(self, count: int) -> Tensor:
        """The next `count` numbers of every image: float64 [B, count], at least 0 and below 1."""
        draws = np.arange(self._used, self._used + count, dtype=np.uint64)
        self._used += count
        return torch.from_numpy((_mix_arrays(self._state, draws) >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def below(self, bound: Tensor | int) -> Tensor:
        """One integer of every image, at least 0 and below `bound` (int64 [B] or one for all): int64 [B]."""
        return (self.uniform(1)[:, 0] * bound).long()


def _mix_arrays(state: np.ndarray | np.uint64, number: np.ndarray | np.uint64) -> np.ndarray:
    """One link of mix() for arrays of uint64, whose arithmetic wraps around."""
    bits = np.asarray(state + number + np.uint64(0x9E3779B97F4A7C15))
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))

"""Random numbers that depend on what they are for and on nothing else: not on order, process or machine."""

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix(*numbers: int) -> int:
    """One well-spread 64-bit seed for a tuple of integers, e.g. (seed, epoch, sample): the finalizer of splitmix64, chained.

    Neighbouring tuples give unrelated seeds, which sums and exclusive-ors of their members would not.
    """
    state = 0
    for number in numbers:
        state = (state + number + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator seeded by mix(*numbers)."""
    return torch.Generator().manual_seed(mix(*numbers))


class Draws:
    """Uniform random numbers for each of B images, on the CPU, without a generator.

    Draw number k of image i is a function of (key, i, k) alone: not of the batch that the image is in, nor of who draws for it.

    Args:
        key: of mix(): what the numbers are for.
        index: int64 [B], CPU: which images.
    """

    def __init__(self, *key: int, index: Tensor) -> None:
        self._state = _mixed(np.uint64(mix(*key)), index.numpy().astype(np.uint64))[:, None]
        self._used = 0

    def uniform(self, count: int) -> Tensor:
        """The next `count` numbers of every image: float64 [B, count], at least 0 and below 1."""
        draws = np.arange(self._used, self._used + count, dtype=np.uint64)
        self._used += count
        return torch.from_numpy((_mixed(self._state, draws) >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def below(self, bound: Tensor | int) -> Tensor:
        """One integer of every image, at least 0 and below `bound` (int64 [B] or one for all): int64 [B]."""
        return (self.uniform(1)[:, 0] * bound).long()


def _mixed(state: np.ndarray | np.uint64, number: np.ndarray) -> np.ndarray:
    """One link of mix() for arrays of uint64, which wrap around as they are."""
    bits: np.ndarray = state + number + np.uint64(_GOLDEN)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))

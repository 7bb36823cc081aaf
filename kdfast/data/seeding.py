"""Random numbers that depend on what they are for and on nothing else: not on order, process or machine."""

import torch

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """One well-spread 64-bit seed for a tuple of integers, e.g. (seed, epoch, sample): the finalizer of splitmix64, chained.

    Neighbouring tuples give unrelated seeds, which sums and exclusive-ors of their members would not.
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator seeded by mix(*numbers)."""
    return torch.Generator().manual_seed(mix(*numbers))

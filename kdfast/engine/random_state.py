"""Derived seeds and the states of all random generators, so that a resumed run draws the same numbers as an uninterrupted one."""

import hashlib
import random
from typing import Any

import numpy as np
import torch


def derive(seed: int, *names: object) -> int:
    """Returns a seed for the place `names`: equal for equal names, unrelated otherwise."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def seed_all(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch (CPU and CUDA)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def state_dict() -> dict[str, Any]:
    """Returns the state of all generators, as plain values and tensors."""
    kind, words, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": list(random.getstate()[1]),
        "numpy": [kind, torch.from_numpy(np.asarray(words).copy()), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def load_state_dict(state: dict[str, Any]) -> None:
    """Puts all generators back to `state`."""
    random.setstate((3, tuple(state["python"]), None))
    kind, words, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, words.numpy(), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])

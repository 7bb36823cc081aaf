"""One process or several: torchrun's environment, and the collective operations that the loop needs."""

import functools
import gc
import io
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among all processes of the run.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        device: of this process.

    Example:
        >>> import torch
        >>> from kdfast.engine import World
        >>> alone = World(rank=0, size=1, device=torch.device("cpu"))
        >>> alone.main, alone.sum(torch.tensor([1.0, 2.0]))
        (True, tensor([1., 2.]))
    """

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """True for the process that writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sums over processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Returns True if the flag is set on any process; waits for all of them."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def gather(self, value: Any) -> list[Any]:
        """Returns every process's value (tensors and plain values) by rank."""
        if self.size == 1:
            return [value]
        packed = io.BytesIO()
        torch.save(value, packed)
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, packed.getvalue())
        return [torch.load(io.BytesIO(one), weights_only=True) for one in gathered]

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copies the main process's values to all processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        """Waits until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leaves the process group and ends its threads."""
        if self.size > 1 and dist.is_initialized():
            gc.collect()  # DDP modules are parts of cycles, and hold the group
            dist.destroy_process_group()


def mean_over_processes(value: Tensor) -> Tensor:
    """Returns the mean over all processes, float32, without gradient and without waiting for the device; one process: the value."""
    if all_processes() is None:
        return value
    value = value.detach().float()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def all_processes() -> "dist.ProcessGroup | None":
    """Returns the group of all processes, for losses over the rows of all of them; None for a single process."""
    alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
    return None if alone else dist.group.WORLD


def join(device: str = "auto") -> World:
    """Joins the processes that torchrun started (it sets RANK, WORLD_SIZE and LOCAL_RANK); without torchrun there is one process.

    Args:
        device: "auto" (CUDA if there is a GPU), "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: there is no such device.

    Example:
        >>> from kdfast.engine import join
        >>> join("cpu")
        World(rank=0, size=1, device=device(type='cpu'))
    """
    size, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")))
    chosen = _device(device, local if size > 1 else None)
    if size > 1 and not dist.is_initialized():
        # DDP imports this module later. Its functions take the current group as a default argument, which would keep the group alive
        # until the interpreter ends; gloo's threads then sometimes abort the process. Import it while there is no group.
        import torch.distributed.nn.functional  # noqa: F401

        # Under the same keys a second group would find, and might call, the addresses of the first. Every join has its own keys.
        store = dist.PrefixStore(f"kdfast/{next(_JOINS)}", _store())
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    return World(rank, size, chosen)


_JOINS = itertools.count()


@functools.cache
def _store() -> "dist.Store":
    """Returns the store through which torchrun's processes meet. The main process may host it, so it lives until the process ends."""
    store, _, _ = next(dist.rendezvous("env://"))
    return store


def _device(name: str, local_rank: int | None) -> torch.device:
    if not isinstance(name, str):
        raise TypeError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {name!r} was asked for, but this PyTorch sees no CUDA GPU")
        device = torch.device("cuda", device.index if device.index is not None else (local_rank or 0))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device {str(device)!r} was asked for, but there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    return device

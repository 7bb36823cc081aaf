"""One process or several: what torchrun's environment says, and the few collective operations that the loop needs."""

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
    """This process among all: its rank, how many there are, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; waits for all of them."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, tensors and plain values, by rank."""
        if self.size == 1:
            return [value]
        packed = io.BytesIO()
        torch.save(value, packed)
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, packed.getvalue())
        return [torch.load(io.BytesIO(one), weights_only=True) for one in everyones]

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """The main process's values, in place, everywhere."""
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
    """The mean over all processes, float32, without a gradient and without waiting for the device; the value itself where alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    value = value.detach().float()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def all_processes() -> "dist.ProcessGroup | None":
    """The group of all processes, for losses that see the rows of all; None where this one is alone."""
    alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
    return None if alone else dist.group.WORLD


def join(device: str = "auto") -> World:
    """Joins the processes that torchrun started (RANK, WORLD_SIZE and LOCAL_RANK are set), or stands alone.

    Args:
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: the device is not there.
    """
    size, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")))
    chosen = _device(device, local if size > 1 else None)
    if size > 1 and not dist.is_initialized():
        # DDP imports this module, whose functions take the group of that moment as their default: imported later, they would hold
        # the group until the interpreter's end, where gloo's threads, still running, now and then abort the process
        import torch.distributed.nn.functional  # noqa: F401

        # a group joined later finds the addresses of the one before under the same keys, and may call those, where nobody listens:
        # every join of this process has keys of its own
        store = dist.PrefixStore(f"kdfast/{next(_JOINS)}", _store())
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    return World(rank, size, chosen)


_JOINS = itertools.count()


@functools.cache
def _store() -> "dist.Store":
    """What torchrun's processes meet by; held until the process ends, for it is the main process's where torchrun has none."""
    store, _, _ = next(dist.rendezvous("env://"))
    return store


def _device(name: str, local_rank: int | None) -> torch.device:
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

"""Real processes that talk through gloo, for tests of what processes do together."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(work: Callable[..., Any], world: int, folder: Path) -> list[Any]:
    """work(rank, world) in `world` processes; what each returned, by rank."""
    running = mp.spawn(_one_process, args=(work, world, str(folder)), nprocs=world, join=False)
    while not running.join(timeout=120):
        pass
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _one_process(rank: int, work: Callable[..., Any], world: int, folder: str) -> None:
    torch.set_num_threads(1)
    # a rank that waits in vain is to fail, and with it the test
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    torch.save(work(rank, world), f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # at the interpreter's end PyTorch 2.11's threads now and then abort a process that has done its work

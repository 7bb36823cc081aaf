"""TensorBoard and Weights & Biases: each gets every line of metrics.jsonl."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

from kdfast import files, imports

Observer = Callable[[dict[str, Any]], None]
Log = Callable[[Path], AbstractContextManager[Observer]]
LogName = Literal["tensorboard", "wandb"]


def logs(names: Sequence[LogName]) -> list[Log]:
    """Returns the logs of those names: functions from the run folder to a context in which the log is open.

    Raises:
        ImportError: a package is not installed.
    """
    found: list[Log] = []
    for name in names:
        module, log = _LOGS[name]
        imports.require(module, extra=name, what=f"log {name}")
        found.append(log)
    return found


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    names = [n for n in line if n not in ("stage", "epoch", "epochs", "best")]
    return {f"{line['stage']}/{name}": line[name] for name in names}


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Observer]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def observe(line: dict[str, Any]) -> None:
        for name, value in _numbers(line).items():
            writer.add_scalar(name, value, line["epoch"])
        writer.flush()

    try:
        yield observe
    finally:
        writer.close()


@contextmanager
def _wandb(folder: Path) -> Iterator[Observer]:
    import wandb

    # a resumed run continues its W&B run; the id is random, since other runs of the project may have the same folder name
    path = folder / "wandb" / "id"
    if not path.exists():
        files.write_text(path, secrets.token_hex(8))
    run = wandb.init(project="kdfast", name=folder.name, dir=str(folder), id=path.read_text(), resume="allow")
    status = 1
    try:
        yield lambda line: run.log(_numbers(line) | {"epoch": line["epoch"]})
        status = 0
    finally:
        run.finish(exit_code=status)  # the next wandb.init of this process starts another run


_LOGS: dict[str, tuple[str, Log]] = {"tensorboard": ("torch.utils.tensorboard", _tensorboard), "wandb": ("wandb", _wandb)}

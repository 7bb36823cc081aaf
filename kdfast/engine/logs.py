"""TensorBoard and Weights & Biases: each is told every line of metrics.jsonl."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from kdfast import files

Observer = Callable[[dict[str, Any]], None]
Log = Callable[[Path], AbstractContextManager[Observer]]


def logs(names: Sequence[str]) -> list[Log]:
    """The logs of those names ("tensorboard", "wandb"): run folder -> a block in which one is open, writing into or under the folder.

    Raises:
        ValueError: the package is not installed.
    """
    makers = {"tensorboard": _tensorboard, "wandb": _wandb}
    return [makers[name]() for name in names]


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    names = [n for n in line if n not in ("stage", "epoch", "epochs", "best")]
    return {f"{line['stage']}/{name}": line[name] for name in names}


def _tensorboard() -> Log:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("log tensorboard needs the package tensorboard: pip install kdfast[tensorboard]") from None

    @contextmanager
    def opened(folder: Path) -> Iterator[Observer]:
        writer = SummaryWriter(str(folder / "tensorboard"))

        def observe(line: dict[str, Any]) -> None:
            for name, value in _numbers(line).items():
                writer.add_scalar(name, value, line["epoch"])
            writer.flush()

        try:
            yield observe
        finally:
            writer.close()

    return opened


def _wandb() -> Log:
    try:
        import wandb
    except ImportError:
        raise ValueError("log wandb needs the package wandb: pip install kdfast[wandb]") from None

    @contextmanager
    def opened(folder: Path) -> Iterator[Observer]:
        # a run that is resumed goes on there as well; the folder's name would not do, for others in the project may have it
        path = folder / "wandb" / "id"
        if not path.exists():
            files.write_text(path, secrets.token_hex(8))
        run = wandb.init(project="kdfast", name=folder.name, dir=str(folder), id=path.read_text(), resume="allow")
        status = 1
        try:
            yield lambda line: run.log(_numbers(line) | {"epoch": line["epoch"]})
            status = 0
        finally:
            run.finish(exit_code=status)  # the next wandb.init of this process begins another run

    return opened

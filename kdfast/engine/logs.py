"""TensorBoard and Weights & Biases: each is told every line of metrics.jsonl."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Observer = Callable[[dict[str, Any]], None]


def observers(names: Sequence[str], folder: Path) -> list[Observer]:
    """The observers of those names ("tensorboard", "wandb"), writing into or under the run folder.

    Raises:
        ValueError: the package is not installed.
    """
    makers = {"tensorboard": _tensorboard, "wandb": _wandb}
    return [makers[name](folder) for name in names]


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    names = [n for n in line if n not in ("stage", "epoch", "epochs", "best")]
    return {f"{line['stage']}/{name}": line[name] for name in names}


def _tensorboard(folder: Path) -> Observer:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("log tensorboard needs the package tensorboard: pip install kdfast[tensorboard]") from None
    writer = SummaryWriter(str(folder / "tensorboard"))

    def observe(line: dict[str, Any]) -> None:
        for name, value in _numbers(line).items():
            writer.add_scalar(name, value, line["epoch"])
        writer.flush()

    return observe


def _wandb(folder: Path) -> Observer:
    try:
        import wandb
    except ImportError:
        raise ValueError("log wandb needs the package wandb: pip install kdfast[wandb]") from None
    run = wandb.init(project="kdfast", name=folder.name, dir=str(folder), id=folder.name, resume="allow")
    return lambda line: run.log(_numbers(line) | {"epoch": line["epoch"]})

"""The steps that `kdfast teacher` and `kdfast distill` share: prepare the images, train stages, evaluate, record."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn

from kdfast import machine, report
from kdfast.commands.config import Distill, Teach
from kdfast.commands.images import load_data, loader_maker, preparation
from kdfast.commands.session import Session
from kdfast.data import Loaders
from kdfast.engine import Evaluation, StageResult, evaluate
from kdfast.models import ModelSpec, parameter_count
from kdfast.recipes.recipe import Stages, keep_last_epoch, map_stages
from kdfast.runs import artifact, results
from kdfast.runs.results import Results, Teacher

C = TypeVar("C", Teach, Distill[Any])
T = TypeVar("T")


class Job(Generic[C]):
    """A training command at work.

    Args:
        config: its options.
        session: its run, not begun yet.

    Raises:
        ValueError: images that cannot be used.
    """

    def __init__(self, config: C, session: Session):
        self.config: C = config
        self.session, self.say = session, session.console.say
        seed, world = config.run.seed, session.world
        self.data, self.notes = load_data(config.data, seed, world, session.console.rich, session.stop)
        for training in (config.training, getattr(config, "teacher_training", config.training)):
            if self.data.val_is_test and (training.early_stop is not None or training.schedule == "plateau"):
                raise ValueError("early_stop and schedule plateau need validation images, and val_fraction is 0: test images would decide")
        self.prepared = preparation(self.data, config.data)
        self.make_loaders = loader_maker(self.data, config.data, self.prepared, seed, world, self.say)
        self.labels_hidden = config.data.label_fraction < 1

    def begin(self, **identity: str) -> None:
        """Begins or continues the run on these images; see Session.begin."""
        self.session.begin(images=self.data.fingerprint(), **identity)

    def train(self, stages: Stages[T], seen: Callable[[StageResult], object] = lambda result: None) -> T:
        """Trains the stages and returns their outcome; `seen` gets each result. Validation images choose the epoch, if there are any."""
        return self.session.run.complete(map_stages(stages, keep_last_epoch if self.data.val_is_test else lambda stage: stage, seen))

    def warn(self, note: str, more: str = "") -> None:
        """Prints a warning, and keeps it as a note of the results."""
        self.say(f"  warning: {note}{more}")
        self.notes.append(note)

    def evaluate(self, model: nn.Module, loaders: Loaders) -> Evaluation:
        """Evaluates a network on the test images."""
        return evaluate(model, loaders.test, self.data.classes, self.session.world)

    def save(self, path: Path, state: dict[str, Any], spec: ModelSpec, **extra: str) -> None:
        """Writes weights with all that it takes to use them."""
        artifact.save(path, state, spec, self.data.classes, self.prepared, **extra)

    def begin_results(self, test_images: int, kept: results.Kept) -> Results:
        """Returns results.json with the parts that all runs share; the networks are left to the command."""
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        world = self.session.world
        return {
            "recipe": "supervised",
            "preset": "default",
            "dataset": self.data.name,
            "classes": list(self.data.classes),
            "test_images": test_images,
            "label_fraction": self.config.data.label_fraction,
            "val_is_test": self.data.val_is_test,
            "kept": kept,
            "teacher": None,
            "student": None,
            "arms": {"alone": [], "distilled": []},
            "confusion": {"alone": None, "distilled": None},
            "paired": None,
            "notes": self.notes,
            "environment": machine.facts() | {"processes": world.size, "device": str(world.device), "command": command},
            "seconds_total": round(self.session.clock.seconds, 1),
        }

    def record(self, found: Results, model: nn.Module, spec: ModelSpec) -> Path:
        """Writes best.safetensors, results.json and the report, removes the checkpoint, and returns the report's path."""
        folder = self.session.folder
        self.save(folder / "best.safetensors", model.state_dict(), spec)
        results.write(folder, found)
        page = report.write_report(folder)
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        return page


def teacher_results(model: nn.Module, spec: ModelSpec, source: str, test: Evaluation) -> Teacher:
    """Returns the teacher's part of results.json."""
    return {
        "model": spec.name,
        "parameters": parameter_count(model),
        "source": source,
        "top1": test.top1,
        "top5": test.top5,
        "loss": test.loss,
        "images_per_s": test.images_per_s,
        "confusion": test.confusion,
    }

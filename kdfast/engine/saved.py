"""The files that a run continues from. Each has a checksum and names its run, and all are checked before a run builds on them.

RUN/metrics.jsonl                  one line an epoch and stage
RUN/checkpoint.pt                  the current stage: weights, optimizer, loader, random states
RUN/stages/<stage>/best.safetensors, last.safetensors, stage.json     a finished stage; stage.json is written last
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from kdfast import files
from kdfast.engine.journal import Journal
from kdfast.models import read_weights, save_weights


class Saved:
    """The files of a run folder.

    Attributes:
        folder: of the run.
        journal: metrics.jsonl.
        checkpoint: path of checkpoint.pt.
        identity: what the run's numbers depend on: name -> text that changes with it. Files with another
            are refused.
    """

    def __init__(self, folder: Path):
        self.folder, self.checkpoint = folder, folder / "checkpoint.pt"
        self.journal = Journal(folder / "metrics.jsonl")
        self.identity: Mapping[str, str] = {}

    def check(self) -> None:
        """Checks every file of earlier sessions.

        Raises:
            ValueError: a file is damaged, missing or of another run.
        """
        finished: dict[str, int] = {}  # stage -> size of the journal at its end
        for path in sorted(self.folder.glob("stages/**/stage.json")):
            stage = path.parent.relative_to(self.folder / "stages").as_posix()
            facts = self.read_stage(stage)
            finished[stage] = facts["journal"][0]
            with explain_damage(train_again(path.parent)):
                self.check_weights(stage, "best", facts["best_epoch"])
                self.check_weights(stage, "last", facts["result"]["epochs"])
        for stage, size in finished.items():
            if missing := self.journal.stages(size) - finished.keys():
                first = self.folder / "stages" / sorted(missing)[0]
                raise ValueError(f"{first} is missing, and stage {stage} was trained after it: {train_again(first)}")
        state = self.read_checkpoint()
        if state is None or state["stage"] in finished:
            return
        self.journal.check(state["journal"], self.checkpoint)
        if self.journal.stages(state["journal"][0]) - finished.keys() - {state["stage"]}:
            return  # an earlier stage was deleted, and is trained again
        if (best := state["best"][1] + 1) > 0:
            with explain_damage(f"delete {self.checkpoint} to train stage {state['stage']} again"):
                # a run that was killed before this epoch's checkpoint may have written its weights
                self.check_weights(state["stage"], "best", best, state["epoch"] + 1)

    # ---- the current stage ----

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        """Writes checkpoint.pt."""
        files.write_torch(self.checkpoint, state | {"run": dict(self.identity), "journal": self.journal.state()})

    def read_checkpoint(self) -> dict[str, Any] | None:
        """Reads checkpoint.pt; None: there is none.

        Raises:
            ValueError: it is damaged or of another run.
        """
        if not self.checkpoint.exists():
            return None
        try:
            state = files.read_torch(self.checkpoint)
        except ValueError as error:
            raise ValueError(f"{error}: delete it to continue from the last finished stage") from None
        self._check_identity(self.checkpoint, state["run"])
        return state

    # ---- stages ----

    def save_weights(self, stage: str, which: str, epoch: int, model: nn.Module, metadata: Mapping[str, str]) -> None:
        """Writes the weights of an epoch, from 1, as "best" or "last"."""
        save_weights(model, self._weights(stage, which), {**metadata, "epoch": self._name_epoch(stage, epoch)})

    def check_weights(self, stage: str, which: str, *epochs: int) -> None:
        """Checks that the weights are whole, and those that this run's stage had after one of these epochs.

        Raises:
            ValueError: they are not.
            FileNotFoundError: there are none.
        """
        path = self._weights(stage, which)
        if read_weights(path)[1].get("epoch") not in [self._name_epoch(stage, epoch) for epoch in epochs]:
            raise ValueError(f"{path} is of another run, stage or epoch")

    def write_stage(self, stage: str, facts: dict[str, Any]) -> None:
        """Writes stage.json, with which the stage is finished."""
        path = self.folder / "stages" / stage / "stage.json"
        files.write_sealed_json(path, facts | {"stage": stage, "run": dict(self.identity), "journal": self.journal.state()})

    def read_stage(self, stage: str) -> dict[str, Any]:
        """Reads stage.json, and checks the lines of metrics.jsonl up to the stage's end.

        Raises:
            ValueError: one of them is damaged or of another run.
        """
        path = self.folder / "stages" / stage / "stage.json"
        with explain_damage(train_again(path.parent)):
            facts = files.read_sealed_json(path)
            if facts["stage"] != stage:
                raise ValueError(f"{path} is of stage {facts['stage']}")
        self._check_identity(path, facts["run"])
        self.journal.check(facts["journal"], path)
        return facts

    # ---- identity ----

    def _weights(self, stage: str, which: str) -> Path:
        return self.folder / "stages" / stage / f"{which}.safetensors"

    def _name_epoch(self, stage: str, epoch: int) -> str:
        return f"{epoch} of {stage} of run {files.checksum(self.identity)[:16]}"

    def _check_identity(self, path: Path, theirs: Mapping[str, str]) -> None:
        for name, ours in self.identity.items():
            if (there := theirs.get(name, "unknown")) != ours:
                raise ValueError(
                    f"{path} is of another run, or this run's {name} changed since it was written: {there} there, {ours} now; put back "
                    "what was there, or begin again with another --out"
                )


def train_again(folder: Path) -> str:
    """Says how to get rid of a damaged stage; later ones depend on its place in the journal."""
    return f"delete {folder} and the folders of the stages after it to train these again"


@contextmanager
def explain_damage(advice: str) -> Iterator[None]:
    """Adds what to do if a file is damaged or missing."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{error}: {advice}") from error

"""Run folders as the engine writes them, and pages as a reader sees them."""

import copy
import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from kdfast.report import write_report
from kdfast.runs.summary import paired_difference

CONFIG = """recipe = "conkd"
seeds = 5
betas = [0.9, 0.99]
amp = true

[student]
model = "resnet18"

[distil.training]
lr = 1e-3
"""


def confusion(rng: random.Random, classes: int, images: int, accuracy: float) -> list[list[int]]:
    """`images` a class, of which about `accuracy` are right and most of the rest go to a neighbour."""
    table = [[0] * classes for _ in range(classes)]
    for i, row in enumerate(table):
        wrong = sum(rng.random() > accuracy for _ in range(images))
        row[i] = images - wrong
        for _ in range(wrong):
            row[(i + rng.choice([1, 1, 1, 2, classes - 1])) % classes] += 1
    return table


def metrics(stage: str, epochs: int, done: int, rng: random.Random, top1: float | None, terms: dict[str, float]) -> list[str]:
    lines = []
    for epoch in range(1, done + 1):
        left = math.exp(-5 * epoch / epochs)
        line: dict[str, Any] = {"stage": stage, "epoch": epoch, "epochs": epochs, "lr": 1e-3}
        line |= {f"train/{name}": value * (0.1 + left) * rng.uniform(0.95, 1.05) for name, value in terms.items()}
        line["train/loss"] = sum(value for key, value in line.items() if key.startswith("train/"))
        line["val/loss"] = 1.2 * line["train/loss"]
        if top1 is not None:
            line |= {"val/top1": top1 * (1 - 0.8 * left) + rng.gauss(0, 0.004), "val/top5": 0.99}
        line |= {"seconds": 1.2, "images_per_s": rng.gauss(5400, 60), "best": epoch % 7 == 1}
        lines.append(json.dumps(line))
    return lines


# results.json but for the numbers of arms and confusion
# fmt: off
RESULTS: dict[str, Any] = {
    "recipe": "conkd", "preset": "notebook", "dataset": "digits", "test_images": 360, "label_fraction": 0.1, "val_is_test": False,
    "teacher": {
        "model": "resnet101", "parameters": 44_549_160, "source": "trained in this run", "top1": 0.9735, "top5": 0.9991, "loss": 0.0871,
        "images_per_s": 812.4,
    },
    "student": {"model": "resnet18", "parameters": 11_689_512, "images_per_s": 4321.0},
    "notes": ["the teacher starts from random weights"],
    "environment": {
        "kdfast": "0.1.0", "torch": "2.15.0", "python": "3.11.2", "cpu": "a CPU of 2 cores", "cores": 2,
        "command": "kdfast distill --recipe conkd --seeds 5",
    },
    "seconds_total": 754.0,
}
# fmt: on


def make_student(rng: random.Random, seed: int, top1: float) -> dict[str, Any]:
    numbers = {"best/top1": top1, "best/top5": rng.uniform(0.98, 0.999), "best/loss": rng.uniform(0.1, 0.2), "last/top1": top1 - 0.0031}
    speed = {"train_images_per_s": rng.uniform(4000, 6000), "seconds": rng.uniform(20, 50)}
    return {"seed": seed, **numbers, "val/top1": top1 + 0.0042, "epoch": rng.randint(3, 30), **speed}


def make_run(
    folder: Path, *, seeds: int = 5, classes: int = 10, baseline: bool = True, finished: bool = True, gain: float = 0.02, curves=True
) -> dict[str, Any]:
    """Writes a run folder as the engine does, and returns its results. Without curves there is no metrics.jsonl, and nothing to draw."""
    rng = random.Random(seeds * 1000 + classes)
    lines = metrics("teacher", 20, 20, rng, 0.97, {"ce": 2.3})
    arms: dict[str, list[dict[str, Any]]] = {"alone": [], "distilled": []}
    for seed in range(seeds):
        for arm in ("alone", "distilled") if baseline else ("distilled",):
            top1 = 0.93 + (gain if arm == "distilled" else 0) + rng.gauss(0, 0.005)
            if arm == "alone":
                lines += metrics(f"seed{seed}/alone", 30, 30, rng, top1, {"ce": 2.3})
            else:
                lines += metrics(f"seed{seed}/distil", 30, 30, rng, None, {"lskd": 9.1, "supcon": 4.2})
                lines += metrics(f"seed{seed}/classify", 15, 15, rng, top1, {"ce": 2.3})
            arms[arm].append(make_student(rng, seed, top1))
    results = copy.deepcopy(RESULTS) | {"classes": [f"class {i}" for i in range(classes)], "arms": arms, "paired": None}
    results["teacher"]["confusion"] = confusion(rng, classes, 36, 0.97)
    alone = confusion(rng, classes, 36 * seeds, 0.93) if baseline else None
    results["confusion"] = {"alone": alone, "distilled": confusion(rng, classes, 36 * seeds, 0.95)}
    if baseline and seeds > 1:
        results["paired"] = paired_difference(*([run["best/top1"] for run in arms[arm]] for arm in ("alone", "distilled")))
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG)
    if curves:
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if finished:
        (folder / "results.json").write_text(json.dumps(results))
    return results


class Text(HTMLParser):
    """The text that a reader sees, and every address that the page names."""

    def __init__(self, page: str):
        super().__init__()
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self._hidden = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden = tag == "style"
        self.tags.add(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(path: Path) -> Text:
    return Text(path.read_text(encoding="utf-8"))


def rewrite(folder: Path, results: dict[str, Any], **changes: Any) -> Text:
    """The report of the run with some of its results changed."""
    (folder / "results.json").write_text(json.dumps(results | changes))
    return read(write_report(folder))

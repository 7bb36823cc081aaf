"""Run folders as the engine writes them, and pages as a reader sees them."""

import copy
import html
import json
import math
import re
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


def confusion(classes: int, images: int, wrong: int) -> list[list[int]]:
    """`images` a class, of which `wrong` and a few more go to the next class."""
    table = [[0] * classes for _ in range(classes)]
    for i, row in enumerate(table):
        row[(i + 1) % classes] = wrong + i % 4
        row[i] = images - wrong - i % 4
    return table


def metrics(stage: str, epochs: int, top1: float | None, *terms: str) -> list[str]:
    lines = []
    for epoch in range(1, epochs + 1):
        left = math.exp(-5 * epoch / epochs)
        line: dict[str, Any] = {"stage": stage, "epoch": epoch, "epochs": epochs, "lr": 1e-3, "seconds": 1.2, "images_per_s": 5400.0}
        line |= {f"train/{term}": 4.0 * (0.1 + left) for term in terms} | {"train/loss": 4.0 * len(terms), "val/loss": 5.0}
        if top1 is not None:
            line |= {"val/top1": top1 * (1 - 0.8 * left), "val/top5": 0.99}
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


def make_student(seed: int, top1: float) -> dict[str, Any]:
    numbers = {"best/top1": top1, "best/top5": 0.98 + 0.001 * seed, "best/loss": 0.1 + 0.01 * seed, "last/top1": top1 - 0.0031}
    return {"seed": seed, **numbers, "val/top1": top1 + 0.0042, "epoch": 3 + seed, "train_images_per_s": 4000.0, "seconds": 20.0 + seed}


def make_run(
    folder: Path, *, seeds: int = 5, classes: int = 10, baseline: bool = True, finished: bool = True, gain: float = 0.02, curves=True
) -> dict[str, Any]:
    """Writes a run folder as the engine does, and returns its results. Without curves there is no metrics.jsonl, and nothing to draw."""
    lines = metrics("teacher", 20, 0.97, "ce")
    top1 = {"alone": [0.93 + 0.0041 * (seed % 3) for seed in range(seeds)] if baseline else []}
    top1["distilled"] = [0.93 + gain + 0.0029 * (seed % 4) for seed in range(seeds)]
    for seed in range(seeds):
        if baseline:
            lines += metrics(f"seed{seed}/alone", 30, top1["alone"][seed], "ce")
        lines += metrics(f"seed{seed}/distil", 30, None, "lskd", "supcon")
        lines += metrics(f"seed{seed}/classify", 15, top1["distilled"][seed], "ce")
    arms = {arm: [make_student(seed, accuracy) for seed, accuracy in enumerate(found)] for arm, found in top1.items()}
    results = copy.deepcopy(RESULTS) | {"classes": [f"class {i}" for i in range(classes)], "arms": arms, "paired": None}
    results["teacher"]["confusion"] = confusion(classes, 36, 1)
    alone = confusion(classes, 36 * seeds, 9) if baseline else None
    results["confusion"] = {"alone": alone, "distilled": confusion(classes, 36 * seeds, 7)}
    if baseline and seeds > 1:
        results["paired"] = paired_difference(top1["alone"], top1["distilled"])
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG)
    if curves:
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if finished:
        (folder / "results.json").write_text(json.dumps(results))
    return results


def read(path: Path) -> str:
    """The text that a reader of the page sees."""
    shown = re.sub("<style.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", shown)).split())


def find_addresses(path: Path) -> list[str]:
    """Every address that the page names."""
    return re.findall(r'\b(?:src|href|srcset|data)="([^"]*)"', path.read_text(encoding="utf-8"))


def rewrite(folder: Path, results: dict[str, Any], **changes: Any) -> str:
    """The text of the run's report with some of its results changed."""
    (folder / "results.json").write_text(json.dumps(results | changes))
    return read(write_report(folder))

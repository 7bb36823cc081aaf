"""kdfast distill: the teacher first, then for every seed the student alone and the student distilled, then the report."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn

from kdfast import files, recipes, report
from kdfast.commands.config import Distill, parse_options
from kdfast.commands.session import Session, environment, load_data, loader_maker, preparation, session
from kdfast.data import ImageData, Loaders
from kdfast.engine import Evaluation, StageResult, evaluate
from kdfast.engine.console import count
from kdfast.models import ModelSpec, build, parameter_count
from kdfast.recipes.features import fingerprint
from kdfast.recipes.plus import Term, plus
from kdfast.recipes.recipe import Extended, Setup, Stages, Trained, each, keeping_the_last
from kdfast.recipes.supervised import alone
from kdfast.recipes.supervised import teacher as supervised_teacher
from kdfast.report.comparison import percent
from kdfast.runs import artifact
from kdfast.runs.artifact import Preparation, Renormalized


@dataclass(frozen=True)
class Arm:
    """One trained student: the last of its stages, and how it does on the test images."""

    model: nn.Module
    spec: ModelSpec
    result: StageResult
    best: Evaluation
    last: Evaluation
    seconds: float


def distill(config: Distill) -> Path:
    """Runs a distillation, or continues it, and returns its folder.

    Raises:
        ValueError: an option, data set or weights file that cannot be used.
        Interrupted, NonFiniteLoss: see kdfast.engine.
    """
    recipe = recipes.get(config.recipe)
    dataset = Path(config.data.dataset).name
    with session(config, f"{recipe.name}-{dataset}-{config.student.replace(':', '.')}") as opened:
        job = _Job(config, opened)
        opened.begin()
        opened.console.say(f"kdfast distill: {recipe.title}")
        opened.console.say(job.header())
        teacher, teacher_facts = job.teacher() if recipe.needs_teacher else (None, None)
        arms = job.students(teacher)
        if opened.world.main:
            job.close(teacher_facts, arms)
        opened.world.barrier()
        return opened.folder


class _Job:
    """A distillation under way."""

    def __init__(self, config: Distill, opened: Session):
        self.config, self._opened, self._recipe = config, opened, recipes.get(config.recipe)
        self._data: ImageData
        self._notes: list[str]
        self._data, self._notes = load_data(config.data, config.run.seed, opened.world, opened.console.rich, opened.stop)
        self._prepared: Preparation = preparation(self._data, config.data)
        self._loaders = loader_maker(self._data, config.data, self._prepared, config.run.seed, opened.world, opened.console.say)
        classes = len(self._data.classes)
        student = parse_options(config.student_options, "student_options")
        teacher = parse_options(config.teacher_options, "teacher_options")
        self._setup = Setup(
            data=replace(self._data, image_size=self._prepared.image_size),
            training=config.training,
            teacher_training=config.teacher_training,
            student_spec=ModelSpec(config.student, classes, options=student),
            teacher_spec=ModelSpec(config.teacher_model, classes, options=teacher),
            student_pretrained=config.pretrained,
            teacher_pretrained=config.teacher_pretrained,
            labels_hidden=config.data.label_fraction < 1,
            seed=config.run.seed,
            make_loaders=self._loaders,
            say=opened.console.say,
        )
        # what cannot work should fail now, not after the teacher's training
        given = config.teacher != "train"
        if given and not self._recipe.needs_teacher:
            raise ValueError(f"teacher {config.teacher} was given, but recipe {config.recipe} has none")
        with torch.device("meta"):
            build(self._setup.student_spec)
            if self._recipe.needs_teacher and not given:
                build(self._setup.teacher_spec)
        self._setup.loaders(config.training)
        self._given = self._given_teacher() if given else None

    def header(self) -> str:
        """What is about to run, in a few lines."""
        data, config, training = self._data, self.config, self.config.training
        labels = (
            "" if not self._setup.labels_hidden else f", {percent(config.data.label_fraction)} of them with their label for the student"
        )
        lines = [
            f"  data: {data.name}, {len(data.train):,} training images{labels}; {len(data.val):,} validation, {len(data.test):,} test",
            f"  student: {config.student}, {count(training.epochs, 'epoch')}, batch {training.batch_size}, "
            f"{training.optimizer} lr {training.lr:g}",
            f"  folder: {self._opened.folder}, on {self._opened.world.device}",
        ]
        if training.micro_batch is not None:
            lines.append(
                f"  micro-batches of {training.micro_batch}: contrastive terms see the whole batch through cached embeddings (two passes), "
                "BatchNorm sees the parts"
            )
        if data.val_is_test:
            lines.append("  note: no validation images (val_fraction 0): the last epoch is kept")
        return "\n".join(lines)

    # ---- teacher ----

    def teacher(self) -> tuple[nn.Module, dict[str, Any]]:
        """The teacher, given or trained, and how it does."""
        config, setup, run = self.config, self._setup, self._opened.run
        given = self._given
        source, before = config.teacher if given else "trained in this run", fingerprint(given.model) if given else None
        if given is None and not config.teacher_pretrained:
            self._notes.append("The teacher was trained in this run, from random weights.")
        stages = self._recipe.teacher or supervised_teacher
        model, spec = run.complete(self._chosen(stages(setup, config.method, given)))
        model.to(self._opened.world.device).eval()
        network = model.model if isinstance(model, Extended) else model
        if given is not None and fingerprint(network) != before:  # conkd's notebook trains it by contrast
            source = f"{source}, trained further in this run"
            self._notes.append(f"The teacher is {source}: it is not the one that was given.")
        if self._opened.world.main and source != config.teacher:
            self._save_teacher(model, spec)
        evaluation = self._evaluate(model, self._setup.loaders(setup.teacher_training, all_labels=True))
        classes = setup.classes
        size = parameter_count(network)
        self._opened.console.say(f"  teacher: {spec.name}, {size:,} parameters, test top-1 {100 * evaluation.top1:.2f} % ({source})")
        if evaluation.top1 < 1.5 / classes:
            text = f"The teacher is no better than chance ({100 * evaluation.top1:.1f} % with {classes} classes)."
            cause = "Is it of these classes, in this order, with this normalization?"
            if config.run.strict:
                raise ValueError(f"{text[0].lower()}{text[1:-1]} (--strict). {cause}")
            self._opened.console.say(f"  warning: {text} {cause}")
            self._notes.append(text)
        facts = {"model": spec.name, "parameters": size, "source": source}
        return model, facts | _numbers(evaluation) | {"images_per_s": evaluation.images_per_s, "confusion": evaluation.confusion}

    def _given_teacher(self) -> Trained:
        config, classes = self.config, self._setup.classes
        loaded = artifact.load(config.teacher, model=config.teacher_model, options=self._setup.teacher_spec.options)
        if loaded.spec.num_classes != classes:
            raise ValueError(f"teacher {config.teacher} has {loaded.spec.num_classes} classes, but {self._data.name} has {classes}")
        if loaded.classes is not None and loaded.classes != self._data.classes:
            raise ValueError(f"teacher {config.teacher} was trained on other classes, or in another order, than {self._data.name}'s")
        expected = loaded.normalization
        if config.teacher_normalization is not None:
            expected = artifact.statistics(config.teacher_normalization)
        given = (self._prepared.mean, self._prepared.std)
        model: nn.Module = loaded.model
        if expected is not None and expected != given:
            model = Renormalized(model, given, expected)
        return Trained(self._recipe.load_teacher(model, loaded.state, loaded.facts), loaded.spec)

    def _save_teacher(self, model: nn.Module, spec: ModelSpec) -> None:
        """teacher.safetensors: for `--teacher RUN/teacher.safetensors` in later runs."""
        tensors, facts = self._recipe.save_teacher(model)
        artifact.save(self._opened.folder / "teacher.safetensors", tensors, spec, self._data.classes, self._prepared, **facts)

    # ---- students ----

    def students(self, teacher: nn.Module | None) -> dict[str, list[Arm]]:
        """For every seed, the student without and with the teacher."""
        arms: dict[str, list[Arm]] = {"alone": [], "distilled": []}
        for k in range(self.config.run.seeds):
            seed = self.config.run.seed + k
            setup = replace(self._setup, seed=seed)
            with self._opened.run.section(f"seed{seed}", seed):
                if self.config.run.baseline:
                    smoothing = getattr(self.config.method, "label_smoothing", 0.0)
                    arms["alone"].append(self._arm(alone(setup, label_smoothing=smoothing), setup))
                arms["distilled"].append(self._arm(self._distilled(setup, teacher), setup))
        return arms

    def _distilled(self, setup: Setup, teacher: nn.Module | None) -> Stages[Trained]:
        stages = self._recipe.distil(setup, self.config.method, teacher)
        if not self.config.plus:
            return stages
        return plus(stages, [Term.parse(term) for term in self.config.plus], teacher, labels_hidden=setup.labels_hidden)

    def _arm(self, stages: Stages[Trained], setup: Setup) -> Arm:
        results: list[StageResult] = []
        model, spec = self._opened.run.complete(self._chosen(stages, results.append))
        model.to(self._opened.world.device).eval()
        loaders = setup.loaders(setup.training)
        results[-1].restore("last")
        last = self._evaluate(model, loaders)
        results[-1].restore("best")
        best = self._evaluate(model, loaders)
        results[-1].restore(results[-1].kept)
        return Arm(model, spec, results[-1], best, last, sum(r.seconds for r in results))

    def _chosen(self, stages: Stages[Trained], seen: Callable[[StageResult], object] = lambda result: None) -> Stages[Trained]:
        """The stages, whose epochs are chosen by validation images where there are any."""
        return each(stages, keeping_the_last if self._data.val_is_test else lambda stage: stage, seen)

    def _evaluate(self, model: nn.Module, loaders: Loaders) -> Evaluation:
        return evaluate(model, loaders.test, self._data.classes, self._opened.world)

    # ---- results ----

    def close(self, teacher: dict[str, Any] | None, arms: dict[str, list[Arm]]) -> None:
        """Writes the best student, results.json and the report, and prints the table."""
        console, folder, data = self._opened.console, self._opened.folder, self._data
        distilled = arms["distilled"]
        kept = distilled[0].result.kept
        chosen = distilled[0]
        if not data.val_is_test:
            chosen = max(distilled, key=lambda arm: arm.result.metrics.get("val/top1", -arm.result.metrics.get("val/loss", 0.0)))
        artifact.save(folder / "best.safetensors", chosen.model.state_dict(), chosen.spec, data.classes, self._prepared)
        if teacher and arms["alone"] and teacher["top1"] < statistics.mean(getattr(arm, kept).top1 for arm in arms["alone"]):
            self._notes.append("The teacher is less accurate than the student alone: it has little to teach.")
            console.say(f"  warning: {self._notes[-1]}")
        seed = self.config.run.seed
        paired = None
        if arms["alone"] and len(distilled) > 1:
            top1 = {name: [getattr(arm, kept).top1 for arm in of] for name, of in arms.items()}
            paired = report.paired_difference(top1["alone"], top1["distilled"])
        results = {
            "recipe": self._recipe.name,
            "preset": self.config.preset,
            "dataset": data.name,
            "classes": list(data.classes),
            "test_images": distilled[0].best.images,
            "label_fraction": self.config.data.label_fraction,
            "val_is_test": data.val_is_test,
            "kept": kept,
            "teacher": teacher,
            "student": self._network(distilled),
            "student_alone": self._network(arms["alone"]) if arms["alone"] else None,
            "arms": {name: [_facts(arm, seed + k) for k, arm in enumerate(of)] for name, of in arms.items()},
            "confusion": {name: _summed([getattr(arm, kept).confusion for arm in of]) for name, of in arms.items()},
            "paired": paired,
            "notes": self._notes,
            "environment": environment(self._opened.world),
            "seconds_total": round(self._opened.clock.seconds, 1),
        }
        files.write_json(folder / "results.json", results)
        page = report.write_report(folder)
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        console.rich.print(table(results))
        console.say(report.verdict(results))
        console.say(f"student: {folder / 'best.safetensors'}")
        console.say(f"report:  {page}")

    def _network(self, arms: Sequence[Arm]) -> dict[str, Any]:
        speed = statistics.median(arm.best.images_per_s for arm in arms)
        return {"model": self.config.student, "parameters": parameter_count(arms[0].model), "images_per_s": speed}


def table(results: dict[str, Any]) -> Table:
    """The closing table: teacher, student alone, student distilled."""
    made = Table(box=box.SIMPLE_HEAD)
    for column in ("", "network", "test top-1", "parameters", "images/s"):
        made.add_column(column, justify="left" if column in ("", "network") else "right")
    for row in report.summary_rows(results):
        spread = f" ± {100 * row.top1_std:.2f}" if row.top1_std is not None else ""
        made.add_row(row.name, row.model, f"{100 * row.top1:.2f}{spread} %", f"{row.parameters:,}", f"{row.images_per_s:,.0f}")
    return made


def _numbers(evaluation: Evaluation) -> dict[str, float]:
    return {"top1": evaluation.top1, "top5": evaluation.top5, "loss": evaluation.loss}


def _facts(arm: Arm, seed: int) -> dict[str, Any]:
    numbers = {f"{which}/{name}": value for which in ("best", "last") for name, value in _numbers(getattr(arm, which)).items()}
    facts = {
        "seed": seed,
        "epoch": arm.result.epoch,
        "train_images_per_s": arm.result.images_per_s,
        "seconds": round(arm.seconds, 2),
    }
    return facts | numbers | arm.result.metrics


def _summed(tables: Sequence[list[list[int]]]) -> list[list[int]] | None:
    return torch.tensor(tables).sum(dim=0).tolist() if tables else None

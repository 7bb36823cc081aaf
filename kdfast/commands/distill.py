"""kdfast distill: the teacher first, then for every seed the student alone and the student distilled, then the report."""

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.table import Table
from torch import nn

from kdfast import files, recipes, report
from kdfast.commands.command_line import resolve
from kdfast.commands.config import Distill, parse_options
from kdfast.commands.job import Job, teacher_results
from kdfast.commands.rehearsal import check_fits, rehearse
from kdfast.commands.session import Session, session
from kdfast.commands.tables import make_table
from kdfast.engine import Evaluation, StageResult
from kdfast.models import ModelSpec, parameter_count
from kdfast.models.zoo import outline
from kdfast.recipes import dih
from kdfast.recipes.features import fingerprint
from kdfast.recipes.plus import Term, plus
from kdfast.recipes.recipe import Extended, Setup, Stages, Trained, seeded
from kdfast.recipes.supervised import alone
from kdfast.recipes.supervised import teacher as supervised_teacher
from kdfast.runs import artifact
from kdfast.runs.artifact import Classifier, Renormalized
from kdfast.runs.results import Kept, Matrix, Network, Results, Student, Teacher
from kdfast.runs.summary import describe_chance
from kdfast.text import count, number, percent, share


def run(arguments: Sequence[str]) -> None:
    """Runs the command."""
    distill(cast("Distill[Any]", resolve("distill", arguments)))


def distill(config: Distill[Any]) -> Path:
    """Runs a distillation, or continues it, and returns its folder.

    Raises:
        ValueError: an option, data set or weights file that cannot be used.
        Interrupted, NonFiniteLoss: see kdfast.engine.
    """
    recipe = recipes.get(config.recipe)
    dataset = Path(config.data.dataset).name
    loaded = _read_teacher(config) if config.teacher != "train" else None
    if loaded is not None:  # config.toml, the report and takd's chain name the given teacher
        config = replace(config, teacher_model=loaded.spec.name)
    with session(config, f"{recipe.name}-{dataset}-{config.student.replace(':', '.')}") as opened:
        distillation = Distillation(config, opened, loaded)
        weights = {"teacher": loaded.path} if loaded else {}
        if heads := getattr(config.method, "heads", None):
            weights["heads"] = dih.find_heads(heads)
        distillation.begin(**{name: files.sha256(path)[:16] for name, path in weights.items()})
        distillation.print_header()
        teacher, teacher_facts = distillation.teacher() if recipe.needs_teacher else (None, None)
        arms = distillation.students(teacher)
        if opened.world.main:
            distillation.close(teacher_facts, arms)
        opened.world.barrier()
        return opened.folder


def _read_teacher(config: Distill[Any]) -> Classifier:
    """Reads the given teacher."""
    if not recipes.get(config.recipe).needs_teacher:
        raise ValueError(f"teacher {config.teacher} was given, but recipe {config.recipe} has none")
    options = parse_options(config.teacher_options, "teacher_options")
    return artifact.load(config.teacher, model=config.teacher_model, options=options, option="--teacher-model")


@dataclass(frozen=True)
class TrainedStudent:
    """One trained student, the result of its last stage, and its numbers on the test images."""

    seed: int
    model: nn.Module
    spec: ModelSpec
    result: StageResult
    best: Evaluation
    last: Evaluation
    seconds: float

    def test(self, kept: Kept) -> Evaluation:
        """Returns the numbers with the weights of the best or the last epoch."""
        return self.last if kept == "last" else self.best

    def results(self) -> Student:
        """Returns the student's part of results.json."""
        facts = {
            "seed": self.seed,
            "epoch": self.result.epoch,
            "train_images_per_s": self.result.images_per_s,
            "seconds": round(self.seconds, 2),
        }
        for which, test in (("best", self.best), ("last", self.last)):
            facts |= {f"{which}/top1": test.top1, f"{which}/top5": test.top5, f"{which}/loss": test.loss}
        return cast(Student, facts | self.result.metrics)


class Distillation(Job[Distill[Any]]):
    """A distillation at work."""

    def __init__(self, config: Distill[Any], opened: Session, loaded: Classifier | None):
        super().__init__(config, opened)
        self._recipe = recipes.get(config.recipe)
        classes = len(self.data.classes)
        student = parse_options(config.student_options, "student_options")
        teacher = parse_options(config.teacher_options, "teacher_options")
        self._setup = Setup(
            data=replace(self.data, image_size=self.prepared.image_size),
            training=config.training,
            teacher_training=config.teacher_training,
            student_spec=ModelSpec(config.student, classes, options=student),
            teacher_spec=loaded.spec if loaded else ModelSpec(config.teacher_model, classes, options=teacher),
            student_pretrained=config.pretrained,
            teacher_pretrained=config.teacher_pretrained,
            labels_hidden=self.labels_hidden,
            seed=config.run.seed,
            make_loaders=self.make_loaders,
            say=self.say,
        )
        self.given = self._adapt_teacher(loaded) if loaded else None
        self._rehearse()

    def _rehearse(self) -> None:
        """Finds now what would otherwise be found after the teacher's training."""
        config, size, classes = self.config, self.prepared.image_size, self._setup.classes
        processes = self.session.world.size
        self._setup.loaders(config.teacher_training)
        loaders = self._setup.loaders(config.training)
        setup = replace(self._setup, make_loaders=lambda *_: loaders, say=lambda line: None)

        def sketch(spec: ModelSpec, make: Callable[[], nn.Module]) -> nn.Module:
            return make() if ":" in spec.name else outline(spec)  # one's own may not run without memory

        with seeded(0):
            check_fits(sketch(setup.student_spec, setup.student), f"student {config.student}", size, classes, trained=True)
            teacher = None
            if self._recipe.needs_teacher:
                given = copy.deepcopy(self.given)  # a recipe may change it
                network = given.model if given else sketch(setup.teacher_spec, setup.new_teacher)
                named = config.teacher_model if given is None else config.teacher
                check_fits(network, f"teacher {named}", size, classes, trained=given is None)
                teacher = rehearse(
                    (self._recipe.teacher or supervised_teacher)(setup, config.method, given), size, classes, processes
                ).model
            rehearse(self._distilled(setup, teacher), size, classes, processes)

    def print_header(self) -> None:
        """Prints what is about to run, in a few lines."""
        data, config, training = self.data, self.config, self.config.training
        labels = f", {share(config.data.label_fraction)} of them with their label for the student" if self.labels_hidden else ""
        self.say(f"kdfast distill: {self._recipe.title}")
        self.say(f"  data: {data.name}, {len(data.train):,} training images{labels}; {len(data.val):,} validation, {len(data.test):,} test")
        epochs = count(training.epochs, "epoch")
        self.say(f"  student: {config.student}, {epochs}, batch {training.batch_size}, {training.optimizer} lr {training.lr:g}")
        if self._recipe.needs_teacher and self.given is None:
            own = config.teacher_training
            self.say(f"  teacher: {config.teacher_model} first, {count(own.epochs, 'epoch')} of its own (--teacher-training.epochs)")
        self.say(f"  folder: {self.session.folder}, on {self.session.world.device}")
        if training.micro_batch is not None:
            parts = f"micro-batches of {training.micro_batch}"
            self.say(f"  {parts}: contrastive terms see the whole batch by cached embeddings (two passes), BatchNorm sees the parts")
        if data.val_is_test:
            self.say("  note: no validation images (val_fraction 0): the last epoch is kept")

    # ---- teacher ----

    def teacher(self) -> tuple[nn.Module, Teacher]:
        """Returns the teacher, given or trained, and its part of results.json."""
        config, setup, given = self.config, self._setup, self.given
        source, before = (config.teacher, fingerprint(given.model)) if given else ("trained in this run", None)
        if given is None and not config.teacher_pretrained:
            self.notes.append("The teacher was trained in this run, from random weights.")
        model, spec = self.train((self._recipe.teacher or supervised_teacher)(setup, config.method, given))
        model.to(self.session.world.device).eval()
        network = model.model if isinstance(model, Extended) else model
        if given is not None and fingerprint(network) != before:  # conkd's notebook trains it by contrast
            source = f"{source}, trained further in this run"
            self.notes.append(f"The teacher is {source}: it is not the one that was given.")
        if self.session.world.main and source != config.teacher:
            tensors, extra = self._recipe.save_teacher(model)
            self.save(self.session.folder / "teacher.safetensors", tensors, spec, **extra)
        facts = teacher_results(network, spec, source, self.evaluate(model, setup.loaders(setup.teacher_training, all_labels=True)))
        self.say(f"  teacher: {spec.name}, {number(facts['parameters'])} parameters, test top-1 {percent(facts['top1'])} % ({source})")
        if not math.isfinite(facts["loss"]):
            raise ValueError(f"the teacher's outputs for the test images are not finite (loss {facts['loss']}): its weights are damaged")
        if chance := describe_chance(facts["confusion"], self.data.classes):
            cause = "Is it of these classes, in this order, with this normalization?"
            if config.run.strict:
                raise ValueError(f"the teacher is {chance} (--strict). {cause}")
            self.warn(f"The teacher is {chance}.", f" {cause}")
        return model, facts

    def _adapt_teacher(self, loaded: Classifier) -> Trained:
        """The given teacher, made to take the student's images."""
        config = self.config
        artifact.check_classes(loaded, self.data.classes, self.data.name)
        for told in artifact.compare_images(loaded, self.prepared):
            self.say(f"  note: teacher {told}")
            self.notes.append(f"Teacher {told}.")
        expected = loaded.normalization
        if config.teacher_normalization is not None:
            expected = artifact.statistics(config.teacher_normalization)
        given = (self.prepared.mean, self.prepared.std)
        model: nn.Module = loaded.model
        if expected is not None and expected != given:
            model = Renormalized(model, given, expected)
        return Trained(self._recipe.load_teacher(model, loaded.state, loaded.facts), loaded.spec)

    # ---- students ----

    def students(self, teacher: nn.Module | None) -> dict[str, list[TrainedStudent]]:
        """Returns the students of every seed, trained without and with the teacher."""
        arms: dict[str, list[TrainedStudent]] = {"alone": [], "distilled": []}
        for seed in range(self.config.run.seed, self.config.run.seed + self.config.run.seeds):
            setup = replace(self._setup, seed=seed)
            with self.session.run.section(f"seed{seed}", seed):
                if self.config.run.baseline:
                    smoothing = getattr(self.config.method, "label_smoothing", 0.0)
                    arms["alone"].append(self._student(alone(setup, label_smoothing=smoothing), setup))
                arms["distilled"].append(self._student(self._distilled(setup, teacher), setup))
        return arms

    def _distilled(self, setup: Setup, teacher: nn.Module | None) -> Stages[Trained]:
        stages = self._recipe.distil(setup, self.config.method, teacher)
        if not self.config.plus:
            return stages
        return plus(stages, [Term.parse(term) for term in self.config.plus], teacher, labels_hidden=setup.labels_hidden)

    def _student(self, stages: Stages[Trained], setup: Setup) -> TrainedStudent:
        results: list[StageResult] = []
        model, spec = self.train(stages, results.append)
        model.to(self.session.world.device).eval()
        loaders = setup.loaders(setup.training)
        results[-1].restore("last")
        last = self.evaluate(model, loaders)
        results[-1].restore("best")
        best = self.evaluate(model, loaders)
        results[-1].restore(results[-1].kept)
        return TrainedStudent(setup.seed, model, spec, results[-1], best, last, sum(r.seconds for r in results))

    # ---- results ----

    def close(self, teacher: Teacher | None, arms: dict[str, list[TrainedStudent]]) -> None:
        """Writes the best student, results.json and the report, and prints the table."""
        alone, distilled = arms["alone"], arms["distilled"]
        chosen, kept = distilled[0], distilled[0].result.kept
        if not self.data.val_is_test:
            chosen = max(distilled, key=lambda s: s.result.metrics.get("val/top1", -s.result.metrics.get("val/loss", 0.0)))
        top1 = {name: [student.test(kept).top1 for student in arm] for name, arm in arms.items()}
        for arm, students in arms.items():
            for student in students:
                if chance := describe_chance(student.test(kept).confusion, self.data.classes):
                    self.warn(f"The student {arm} of seed {student.seed} is {chance}.")
        if teacher and teacher["top1"] < statistics.mean(top1["alone"] or top1["distilled"]):
            self.warn(f"The teacher is less accurate than the student{' alone' if alone else ''}: it has little to teach.")
        results = self.begin_results(chosen.best.images, kept)
        results |= {
            "recipe": self._recipe.name,
            "preset": self.config.preset,
            "teacher": teacher,
            "student": self._network(distilled),
            "student_alone": self._network(alone) if alone else None,
            "arms": {"alone": [student.results() for student in alone], "distilled": [student.results() for student in distilled]},
            "confusion": {"alone": _sum_confusions(alone, kept), "distilled": _sum_confusions(distilled, kept)},
        }
        if alone and len(distilled) > 1:
            results["paired"] = report.paired_difference(top1["alone"], top1["distilled"])
        page = self.record(results, chosen.model, chosen.spec)
        self.session.console.rich.print(closing_table(results))
        self.say(report.verdict(results))
        self.say(f"student: {self.session.folder / 'best.safetensors'}")
        self.say(f"report:  {page}")

    def _network(self, arm: Sequence[TrainedStudent]) -> Network:
        speed = statistics.median(student.best.images_per_s for student in arm)
        return {"model": self.config.student, "parameters": parameter_count(arm[0].model), "images_per_s": speed}


def closing_table(results: Results) -> Table:
    """Returns the closing table: teacher, student alone, student distilled."""
    rows = []
    for row in report.summary_rows(results):
        spread = f" ± {percent(row.top1_std)}" if row.top1_std is not None else ""
        rows.append((row.name, row.model, f"{percent(row.top1)}{spread} %", number(row.parameters), number(row.images_per_s)))
    return make_table(("", "network", "test top-1", "parameters", "images/s"), rows, left=2)


def _sum_confusions(arm: Sequence[TrainedStudent], kept: Kept) -> Matrix | None:
    return torch.tensor([student.test(kept).confusion for student in arm]).sum(dim=0).tolist() if arm else None

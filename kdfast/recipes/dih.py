"""DIH, distilling knowledge via intermediate classifiers (Asadian, Salehi-Abari 2021, arXiv:2103.00497).

Use it when the teacher is much larger than the student and no assistant is to be trained: heads on the teacher's stages are weaker
teachers beside its final classifier.

    1. the teacher is trained with cross-entropy
    2. k heads, each Flatten - Linear, one on the output of each stage of the frozen teacher, are trained together on the sum of their CE
    3. the student: loss = sum over h in {final classifier, heads 1..k} of (1 - a_h) CE(s, y) + a_h T^2 KL(t_h || s)

All k + 1 teachers are one fused call. The run keeps the heads: `--heads RUN` uses them again, together with their teacher.

Presets: dih-readme and dih-code (the authors' README and code, which differ).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kdfast.data import Batch
from kdfast.engine.ranges import Checked, Temperature, UpToOne
from kdfast.engine.stage import Outputs, Terms
from kdfast.models import flatten_head, read_weights
from kdfast.recipes import kd, supervised
from kdfast.recipes.features import FeatureMaps, fingerprint
from kdfast.recipes.recipe import Extended, Preset, Recipe, Setup, Stages, Trained
from kdfast.recipes.remembered import Remembered
from kdfast.recipes.trainings import DIH_CODE, DIH_README


@dataclass(frozen=True)
class Settings(Checked):
    """Hyper-parameters of distillation via intermediate classifiers."""

    temperature: Temperature = 5.0
    """T, softens all distributions."""
    alpha: tuple[UpToOne, ...] = (0.1,)
    """Weight a_h of a teacher's term, which has the factor T^2 already; 1 - a_h is its cross-entropy's. One for all, or one for the final
    classifier and each head in turn; 0 leaves a head out altogether."""
    label_smoothing: UpToOne = 0.0
    """Label smoothing of the cross-entropy."""
    heads: Path | None = None
    """A run whose heads are used again; none: trained here."""
    teacher_stages: tuple[str, ...] = ()
    """Modules of the teacher whose outputs get a head; none: the ends of its stages."""

    def __post_init__(self) -> None:
        if not self.alpha or not all(type(a) in (int, float) and 0 <= a <= 1 for a in self.alpha):
            raise ValueError(f"alpha must be from 0 to 1, one for all or one a classifier, got {', '.join(map(str, self.alpha)) or 'none'}")
        super().__post_init__()
        if not any(self.alpha):
            raise ValueError("alpha must be above 0 for at least one classifier: the student would have no teacher")


class HeadedTeacher(Extended):
    """A classifier with a head on each of its stages: k + 1 predictions for an image.

    Args:
        model: images -> logits.
        maps: the same network with its feature maps.
        heads: feature map -> logits, one a stage.
    """

    def __init__(self, model: nn.Module, maps: FeatureMaps, heads: nn.ModuleList):
        super().__init__(model)
        self.maps, self.heads = maps, heads

    def predict(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> logits [B, C] of the final classifier, then of each head."""
        logits, features = self.maps(images)
        return [logits, *(head(F) for head, F in zip(self.heads, features))]


def train_heads(setup: Setup, settings: Settings, given: Trained | None) -> Stages[Trained]:
    """Takes or trains the teacher, then loads or trains its heads."""
    if settings.heads is not None and given is None:
        raise ValueError("heads belong to one teacher: name it with --teacher, as in the run that trained them")
    model, spec = yield from supervised.teacher(setup, settings, given)
    maps = FeatureMaps(model, settings.teacher_stages, "teacher_stages", setup.data.image_size)
    count = 1 + len(maps.paths)
    if len(settings.alpha) not in (1, count):
        raise ValueError(f"alpha must be 1 value or {count}, one for each of the teacher's classifiers, got {len(settings.alpha)}")
    teacher = HeadedTeacher(model, maps, nn.ModuleList(flatten_head(shape, setup.classes) for shape in maps.shapes))
    facts = {"teacher": fingerprint(model), "stages": json.dumps(maps.paths), "classes": str(setup.classes)}
    if settings.heads is not None:
        _load(teacher.heads, settings.heads, facts)
    else:
        yield from supervised.train_heads(
            setup, model, teacher.heads, lambda images: teacher.predict(images)[1:], maps.paths, metadata=facts
        )
    return Trained(teacher, spec)


def find_heads(run: Path) -> Path:
    """Returns the file of the heads in a run's folder, or the path itself if it is a file.

    Raises:
        ValueError: there are none.
    """
    path = run / "stages" / supervised.HEADS / "best.safetensors" if run.is_dir() else run
    if not path.exists():
        raise ValueError(f"heads: {run} holds none: it is not a run of recipe dih that trained heads")
    return path


def _load(heads: nn.ModuleList, run: Path, facts: Mapping[str, str]) -> None:
    """Loads the heads from a run's folder or from a weights file.

    Raises:
        ValueError: it has no heads, or heads of another teacher, other stages or other classes.
    """
    path = find_heads(run)
    state, found = read_weights(path)
    for name, meaning in (
        ("teacher", "another teacher's heads"),
        ("stages", "heads of other stages"),
        ("classes", "heads of other classes"),
    ):
        if found.get(name) != facts[name]:
            raise ValueError(f"heads: {run} holds {meaning}: {found.get(name, 'none')} there, {facts[name]} here")
    heads.load_state_dict({name.removeprefix("0."): tensor for name, tensor in state.items()})


def distil(setup: Setup, settings: Settings, teacher: HeadedTeacher) -> Stages[Trained]:
    """One stage: the student follows all classifiers of the teacher."""
    student = setup.student()
    alpha = settings.alpha if len(settings.alpha) > 1 else settings.alpha * (1 + len(teacher.heads))
    used = [h for h, a in enumerate(alpha) if a > 0]
    alphas = [alpha[h] for h in used]
    weights = kd.Settings(settings.temperature, 1.0, ce_weight=sum(1 - a for a in alphas), label_smoothing=settings.label_smoothing)
    names = [f"teacher's head {h}" if h else "teacher" for h in used]

    def predict(images: Tensor) -> Tensor:
        logits = teacher.predict(images)
        return torch.stack([logits[h] for h in used], dim=1)

    data = setup.loaders(setup.training)
    targets = Remembered(predict, data, setup.training.epochs)

    def forward(batch: Batch) -> Outputs:
        of_heads = targets(batch, training=student.training).unbind(1)
        return {"logits": student(batch.images)} | dict(zip(names, of_heads))

    def loss(outputs: Outputs, batch: Batch) -> Terms:
        of_heads = [outputs[name] for name in names]
        return kd.terms(outputs["logits"], of_heads, batch.labels, weights, hidden=setup.labels_hidden, teacher_weights=alphas)

    yield setup.stage("distil", train=(student,), frozen=(teacher,), data=data, prepare=targets.prepare, forward=forward, loss=loss)
    return Trained(student, setup.student_spec)


RECIPE = Recipe(
    name="dih",
    title="Intermediate classifiers (Asadian, Salehi-Abari 2021): the teacher's stages teach through heads of their own",
    settings=Settings,
    presets={
        "default": Preset("T = 5, weight 0.1 for the final classifier and for each head, trained as suits the data set"),
        "dih-readme": Preset(
            "the authors' README: lr 0.1, batch 64, 200 epochs, x 0.1 at 60/120/180 (their code: 0.05, 128, 240, x 0.2 at 150/180/210); "
            "they average seeds 30, 50 and 67",
            {**DIH_README, "temperature": 5.0, "alpha": (0.1,)},
        ),
        "dih-code": Preset(
            "the authors' code: lr 0.05, batch 128, 240 epochs, x 0.2 at 150/180/210 (their README: 0.1, 64, 200, x 0.1 at 60/120/180); "
            "they average seeds 30, 50 and 67",
            {**DIH_CODE, "temperature": 5.0, "alpha": (0.1,)},
        ),
    },
    distil=distil,
    teacher=train_heads,
)

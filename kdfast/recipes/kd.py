"""Knowledge distillation (Hinton, Vinyals, Dean 2015, arXiv:1503.02531).

Use it first: it needs only the logits of both networks, works for any pair of architectures, and is the baseline of every other recipe.

    loss = ce_weight CE(s, y) + kd_weight T^2 KL(softmax(t / T) || softmax(s / T))

Presets: repdistiller (Tian et al. 2020), dih-readme and dih-code (Asadian, Salehi-Abari 2021), imagenet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from kdfast.data import Batch
from kdfast.engine.ranges import Checked, NotNegative, Temperature, UpToOne
from kdfast.engine.stage import Mean, Outputs, Terms
from kdfast.functional import kd_loss
from kdfast.models import ModelSpec
from kdfast.recipes.recipe import Preset, Recipe, Setup, Stages, Trained, cross_entropy
from kdfast.recipes.remembered import Remembered
from kdfast.recipes.trainings import DIH_CODE, DIH_README, IMAGENET, REPDISTILLER


@dataclass(frozen=True)
class Settings(Checked):
    """Hyper-parameters of logit distillation."""

    temperature: Temperature = 4.0
    """T, softens both distributions."""
    kd_weight: NotNegative = 0.9
    """Weight of the teacher's term, which has the factor T^2 already."""
    ce_weight: NotNegative = 0.1
    """Weight of the cross-entropy with the labels."""
    standardize: bool = False
    """Standardize each row of logits first (logit standardization)."""
    label_smoothing: UpToOne = 0.0
    """Label smoothing of the cross-entropy."""


def distil(setup: Setup, settings: Settings, teacher: nn.Module) -> Stages[Trained]:
    """One stage: the student follows the frozen teacher's logits."""
    return (yield from follow("distil", setup, settings, setup.student(), setup.student_spec, teacher))


def follow(name: str, setup: Setup, settings: Settings, student: nn.Module, spec: ModelSpec, teacher: nn.Module) -> Stages[Trained]:
    """A stage of this name in which `student` follows `teacher`."""
    data = setup.loaders(setup.training)
    targets = Remembered(teacher, data, setup.training.epochs)

    def forward(batch: Batch) -> Outputs:
        target = targets(batch, training=student.training)
        return {"logits": student(batch.images), "teacher": target}

    def loss(outputs: Outputs, batch: Batch) -> Terms:
        return terms(outputs["logits"], outputs["teacher"], batch.labels, settings, hidden=setup.labels_hidden)

    yield setup.stage(name, train=(student,), frozen=(teacher,), data=data, prepare=targets.prepare, forward=forward, loss=loss)
    return Trained(student, spec)


def terms(
    student: Tensor,
    teacher: Tensor | Sequence[Tensor],
    labels: Tensor,
    settings: Settings,
    *,
    hidden: bool,
    teacher_weights: Sequence[float] | None = None,
) -> dict[str, Tensor | Mean]:
    """Returns the loss terms of logits [B, C]: cross-entropy for labelled images, the teacher for all. A weight of 0 leaves a term out.

    If no label is hidden, one fused call computes both terms. Otherwise they are means over different rows and need two calls: kd_loss
    leaves an image without a label out of both terms.

    Args:
        student: logits.
        teacher: logits of one teacher or of several.
        labels: int64 [B], -100 where hidden.
        settings: weights and temperature.
        hidden: some labels are hidden.
        teacher_weights: one for each teacher.
    """
    smoothing, ce_weight = settings.label_smoothing, settings.ce_weight
    ce_and_kd = partial(
        kd_loss,
        student,
        teacher,
        temperature=settings.temperature,
        standardize=settings.standardize,
        kd_weight=settings.kd_weight,
        teacher_weights=teacher_weights,
        label_smoothing=smoothing,
    )
    if settings.kd_weight and ce_weight and not hidden:
        return {"ce+kd": ce_and_kd(labels, ce_weight=ce_weight)}
    found: dict[str, Tensor | Mean] = {"kd": ce_and_kd()} if settings.kd_weight else {}
    if ce_weight or not found:
        found["ce"] = ce_weight * cross_entropy(student, labels, label_smoothing=smoothing, hidden=hidden)
    return found


RECIPE = Recipe(
    name="kd",
    title="Knowledge distillation (Hinton et al. 2015): the student follows the teacher's softened logits",
    settings=Settings,
    presets={
        "default": Preset("T = 4, 0.1 CE + 0.9 T^2 KL, trained as suits the data set"),
        "repdistiller": Preset(
            "RepDistiller's CIFAR-100 tables (Tian et al. 2020); for MobileNet and ShuffleNet its lr is 0.01",
            {**REPDISTILLER, "temperature": 4.0, "kd_weight": 0.9, "ce_weight": 0.1},
        ),
        "dih-readme": Preset(
            "Distilling Knowledge via Intermediate Classifiers, README (its code: lr 0.05, batch 128, 240 epochs, x 0.2 at 150/180/210)",
            {**DIH_README, "temperature": 5.0, "kd_weight": 0.1, "ce_weight": 0.9},
        ),
        "dih-code": Preset(
            "Distilling Knowledge via Intermediate Classifiers, code (its README: lr 0.1, batch 64, 200 epochs, x 0.1 at 60/120/180)",
            {**DIH_CODE, "temperature": 5.0, "kd_weight": 0.1, "ce_weight": 0.9},
        ),
        "imagenet": Preset(
            "ImageNet, ResNet-34 to ResNet-18: T = 1, equal weights",
            {**IMAGENET, "temperature": 1.0, "kd_weight": 0.5, "ce_weight": 0.5},
        ),
    },
    distil=distil,
)

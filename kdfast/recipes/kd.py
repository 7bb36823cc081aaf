"""Knowledge distillation (Hinton, Vinyals, Dean 2015, arXiv:1503.02531).

loss = ce_weight CE(s, y) + kd_weight T^2 KL(softmax(t / T) || softmax(s / T))
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from kdfast.data import Batch
from kdfast.engine.stage import Mean, Outputs
from kdfast.models import ModelSpec
from kdfast.recipes.recipe import Preset, Recipe, Setup, Stages, Trained, ce_and_kd, cross_entropy
from kdfast.recipes.remembered import Remembered


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of logit distillation."""

    temperature: float = 4.0
    """T, softens both distributions."""
    kd_weight: float = 0.9
    """Weight of the teacher's term, which has the factor T^2 already."""
    ce_weight: float = 0.1
    """Weight of the cross-entropy with the labels."""
    standardize: bool = False
    """Standardize each row of logits first (logit standardization)."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.kd_weight < 0 or self.ce_weight < 0:
            raise ValueError(f"kd_weight and ce_weight must not be negative, got {self.kd_weight} and {self.ce_weight}")


def distil(setup: Setup, settings: Settings, teacher: nn.Module | None) -> Stages[Trained]:
    """One stage: the student follows the frozen teacher's logits."""
    assert teacher is not None
    return (yield from follow("distil", setup, settings, setup.student(), setup.student_spec, teacher))


def follow(name: str, setup: Setup, settings: Settings, student: nn.Module, spec: ModelSpec, teacher: nn.Module) -> Stages[Trained]:
    """A stage of this name in which `student` follows `teacher`."""
    data = setup.loaders(setup.training)
    answers = Remembered(teacher, data, setup.training.epochs)

    def forward(batch: Batch) -> Outputs:
        target = answers(batch, training=student.training)
        return {"logits": student(batch.images), "teacher": target}

    yield setup.stage(
        name,
        train=(student,),
        frozen=(teacher,),
        data=data,
        prepare=answers.prepare,
        forward=forward,
        loss=lambda outputs, batch: terms(outputs["logits"], outputs["teacher"], batch.labels, settings, hidden=setup.labels_hidden),
    )
    return Trained(student, spec)


def terms(student: Tensor, teacher: Tensor, labels: Tensor, settings: Settings, *, hidden: bool) -> dict[str, Tensor | Mean]:
    """The terms of logits [B, C], for recipes that have others beside them; a teacher whose weight is 0 is left out."""
    if settings.kd_weight == 0:
        ce = cross_entropy(student, labels, label_smoothing=settings.label_smoothing, hidden=hidden)
        return {"ce": settings.ce_weight * ce}
    return ce_and_kd(
        student,
        teacher,
        labels,
        temperature=settings.temperature,
        standardize=settings.standardize,
        ce_weight=settings.ce_weight,
        kd_weight=settings.kd_weight,
        label_smoothing=settings.label_smoothing,
        hidden=hidden,
    )


# the CIFAR-100 training of RepDistiller, which later papers kept for their tables
REPDISTILLER: Mapping[str, object] = {
    "dataset": "cifar100",
    "batch_size": 64,
    "epochs": 240,
    "optimizer": "sgd",
    "lr": 0.05,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "steps",
    "milestones": (150, 180, 210),
    "gamma": 0.1,
    "augment": "cifar",
    "normalization": "repdistiller-cifar100",
    "val_fraction": 0.0,
}
IMAGENET: Mapping[str, object] = {
    "dataset": "folder",
    "batch_size": 512,
    "epochs": 100,
    "optimizer": "sgd",
    "lr": 0.2,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "schedule": "steps",
    "milestones": (30, 60, 90),
    "gamma": 0.1,
    "augment": "imagenet",
    "val_fraction": 0.0,
    "teacher_model": "resnet34",
    "student": "resnet18",
}
_DIH: Mapping[str, object] = {
    "dataset": "cifar100",
    "teacher_model": "resnet110",
    "student": "resnet8",
    "optimizer": "sgd",
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 5e-4,
    "schedule": "steps",
    "augment": "cifar-reflect",
    "val_fraction": 0.0,
}
DIH_README = {**_DIH, "lr": 0.1, "batch_size": 64, "epochs": 200, "milestones": (60, 120, 180), "gamma": 0.1}
DIH_CODE = {**_DIH, "lr": 0.05, "batch_size": 128, "epochs": 240, "milestones": (150, 180, 210), "gamma": 0.2}

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

"""ConKD-Lion: logit standardization with a supervised contrastive term, and Lion.

Three procedures:

    joint (the default)   one stage on the whole student:
                          loss = ce_weight CE(s, y) + kd_weight T^2 KL(z(t) || z(s)) + alpha SupCon(projection(features), y)
    readme                the project's README: loss = T^2 KL(z(t) || z(s)) + alpha SupContrastive(features, y), no cross-entropy
    notebook              the project's notebooks, in two stages: the encoder learns the teacher's embedding, whose 128 numbers
                          are treated as logits, loss = T^2 KL(z(t) || z(s)) + alpha SupCon(the embedding twice, as two views);
                          then a classifier is trained on the frozen encoder, with Lion. The teacher is trained likewise:
                          SupCon on its embedding, then a linear classifier.

z is standardization (lskd.py), T the temperature. In `joint` an image whose label is hidden is contrasted under the teacher's
most likely class; elsewhere it is alone in its class. Where several processes train, an image is contrasted with the images of
them all, as in one process; in validation with those of its own process.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdfast.data import HIDDEN, Batch, Loaders
from kdfast.engine import Stage, Training
from kdfast.engine.stage import Outputs, Terms, lr_factor
from kdfast.functional import kd_loss, supcon_loss
from kdfast.models import Taps, classifier_head, feature_size, projection_head, replace_head
from kdfast.recipes.features import head_input
from kdfast.recipes.recipe import (
    Extended,
    Preset,
    Recipe,
    Setup,
    Stages,
    Trained,
    alone_where_hidden,
    ce_and_kd,
    contrasted_processes,
    cross_entropy,
    save_network,
)
from kdfast.recipes.remembered import Remembered
from kdfast.recipes.supervised import teacher as supervised_teacher

EMBEDDING = 128  # numbers an image is embedded in


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of ConKD."""

    procedure: Literal["joint", "readme", "notebook"] = "joint"
    """Which of the three procedures."""
    alpha: float = 0.15
    """Weight of the contrastive term."""
    temperature: float = 2.0
    """T, over the standardized logits (notebook: over the standardized embedding)."""
    contrast_temperature: float = 0.07
    """Temperature of the contrastive term."""
    kd_weight: float = 9.0
    """Weight of the teacher's term, which has the factor T^2 already; standardized logits want about 9 (lskd.py)."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy (joint)."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy (joint)."""
    classify_epochs: int = 50
    """Epochs of the student's classifier (notebook)."""
    classify_lr: float = 1e-4
    """Learning rate of the student's classifier, with Lion (notebook)."""
    classify_weight_decay: float = 1e-4
    """Weight decay of the student's classifier (notebook)."""
    teacher_classify_epochs: int = 40
    """Epochs of the teacher's classifier, with AdamW (notebook)."""
    teacher_classify_lr: float = 5e-4
    """Learning rate of the teacher's classifier (notebook)."""
    cosine_from_one: bool = False
    """Quirk of the notebooks: their cosine counts epochs from 1, so the first epoch is already below the full rate."""
    keep_last_classifier: bool = False
    """Quirk of the notebooks: the classifier tested is the last epoch's, not the best."""

    def __post_init__(self) -> None:
        for name in ("temperature", "contrast_temperature", "classify_lr", "teacher_classify_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("alpha", "kd_weight", "ce_weight", "classify_weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("classify_epochs", "teacher_classify_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class EmbeddingTeacher(Extended):
    """A classifier with the projection that its features were trained under.

    Args:
        model: images -> logits.
        projection: features -> embedding of length 1.
    """

    def __init__(self, model: nn.Module, projection: nn.Module):
        super().__init__(model)
        self.projection = projection
        self._tapped = Taps(model, (head_input(model)[0],))

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> embedding [B, 128], rows of length 1."""
        _, (features,) = self._tapped(images)
        return self.projection(features)


def distil(setup: Setup, settings: Settings, teacher: nn.Module | None) -> Stages[Trained]:
    """The stages of the chosen procedure."""
    assert teacher is not None
    if settings.procedure == "notebook":
        assert isinstance(teacher, EmbeddingTeacher)
        return (yield from _notebook(setup, settings, teacher))
    return (yield from _joint(setup, settings, teacher))


def _joint(setup: Setup, settings: Settings, teacher: nn.Module) -> Stages[Trained]:
    student = setup.student()
    readme = settings.procedure == "readme"
    tap, features = head_input(student)
    projection = nn.Identity() if readme else projection_head(features, EMBEDDING)
    tapped = Taps(student, (tap,))
    data = setup.loaders(setup.training)
    answers = Remembered(teacher, data, setup.training.epochs)

    def forward(batch: Batch) -> Outputs:
        target = answers(batch, training=student.training)
        logits, (features,) = tapped(batch.images)
        return {"logits": logits, "embedding": projection(features.flatten(1)), "teacher": target}

    def loss(outputs: Outputs, batch: Batch) -> Terms:
        terms = ce_and_kd(
            outputs["logits"],
            outputs["teacher"],
            batch.labels,
            temperature=settings.temperature,
            standardize=True,
            kd_weight=settings.kd_weight,
            ce_weight=0.0 if readme else settings.ce_weight,
            label_smoothing=settings.label_smoothing,
            hidden=setup.labels_hidden,
        )
        likely = outputs["teacher"].argmax(dim=1)
        contrast = supcon_loss(
            outputs["embedding"],
            alone_where_hidden(batch.labels, batch.index) if readme else torch.where(batch.labels == HIDDEN, likely, batch.labels),
            temperature=settings.contrast_temperature,
            self_positive=readme,
            normalize=readme,
            group=contrasted_processes(),
        )
        return terms | {"supcon": settings.alpha * contrast}

    yield setup.stage(
        "distil",
        train=(student, projection),
        frozen=(teacher,),
        data=data,
        prepare=answers.prepare,
        forward=forward,
        loss=loss,
        couples_rows=True,
    )
    return Trained(student, setup.student_spec)


def _notebook(setup: Setup, settings: Settings, teacher: EmbeddingTeacher) -> Stages[Trained]:
    encoder = setup.student(head="none")
    projection = projection_head(feature_size(encoder), EMBEDDING)

    def forward(batch: Batch) -> Outputs:
        with torch.no_grad():
            target = teacher.embed(batch.images)
        return {"embedding": projection(encoder(batch.images)), "teacher": target}

    def loss(outputs: Outputs, batch: Batch) -> Terms:
        return {
            "lskd": settings.kd_weight
            * kd_loss(outputs["embedding"], outputs["teacher"], temperature=settings.temperature, standardize=True),
            "supcon": settings.alpha * _contrast_twice(outputs["embedding"], batch, settings),
        }

    yield setup.stage(
        "distil",
        train=(encoder, projection),
        frozen=(teacher,),
        forward=forward,
        loss=loss,
        best="val/loss",
        couples_rows=True,
        lr_factor=_lr_factor_from_one if settings.cosine_from_one else lr_factor,
    )

    head = classifier_head(feature_size(encoder), setup.classes)
    training = Training(
        epochs=settings.classify_epochs,
        batch_size=setup.training.batch_size,
        micro_batch=setup.training.micro_batch,
        optimizer="lion",
        lr=settings.classify_lr,
        weight_decay=settings.classify_weight_decay,
        schedule="plateau",
        gamma=0.1,
        plateau_patience=3,
        early_stop=5,
    )
    keep: Literal["best", "last"] = "last" if settings.keep_last_classifier else "best"
    yield _classify("classify", encoder, head, training, setup.loaders(training), keep, hidden=setup.labels_hidden)
    return Trained(replace_head(encoder, head), replace(setup.student_spec, head="mlp"))


def train_teacher(setup: Setup, settings: Settings, given: Trained | None) -> Stages[Trained]:
    """The notebook's teacher: a contrastive stage, from the given weights where there are some, then a linear classifier."""
    if settings.procedure != "notebook":
        return (yield from supervised_teacher(setup, settings, given))
    if given is not None and isinstance(given.model, EmbeddingTeacher):
        return given

    encoder, spec = given if given is not None else (setup.new_teacher(), setup.teacher_spec)
    features = feature_size(encoder)
    replace_head(encoder, nn.Identity())
    projection = projection_head(features, EMBEDDING)
    yield Stage(
        "teacher/contrast",
        train=(encoder, projection),
        forward=lambda batch: {"embedding": projection(encoder(batch.images))},
        loss=lambda outputs, batch: {"supcon": _contrast_twice(outputs["embedding"], batch, settings)},
        data=setup.loaders(setup.teacher_training, augment="conkd-teacher", all_labels=True),
        training=setup.teacher_training,
        best="val/loss",
        couples_rows=True,
        lr_factor=_lr_factor_from_one if settings.cosine_from_one else lr_factor,
    )

    head = nn.Linear(features, setup.classes)
    training = Training(
        epochs=settings.teacher_classify_epochs,
        batch_size=setup.teacher_training.batch_size,
        micro_batch=setup.teacher_training.micro_batch,
        optimizer="adamw",
        lr=settings.teacher_classify_lr,
        weight_decay=0.01,
        schedule="constant",
    )
    data = setup.loaders(training, augment="conkd-teacher", all_labels=True)
    yield _classify("teacher/classify", encoder, head, training, data, "best", hidden=False)
    return Trained(EmbeddingTeacher(replace_head(encoder, head), projection), spec)


def save_teacher(teacher: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The network's weights, and with them the projection of a teacher that has one."""
    tensors, facts = save_network(teacher)
    if isinstance(teacher, EmbeddingTeacher):
        tensors |= {f"projection.{name}": value for name, value in teacher.projection.state_dict().items()}
        facts["projection"] = str(EMBEDDING)
    return tensors, facts


def load_teacher(network: nn.Module, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> nn.Module:
    """The network, with its projection if its file holds one."""
    if "projection" not in facts:
        return network
    projection = projection_head(head_input(network)[1], int(facts["projection"]))
    projection.load_state_dict({name.removeprefix("projection."): t for name, t in tensors.items() if name.startswith("projection.")})
    return EmbeddingTeacher(network, projection)


def _lr_factor_from_one(training: Training, epoch: int) -> float:
    """The notebooks' learning rate: the cosine counts epochs from 1."""
    return lr_factor(training, epoch + (training.schedule == "cosine" and epoch >= training.warmup))


def _contrast_twice(embedding: Tensor, batch: Batch, settings: Settings) -> Tensor:
    """SupCon of the embedding given twice, as two views."""
    return supcon_loss(
        embedding,
        alone_where_hidden(batch.labels, batch.index),
        temperature=settings.contrast_temperature,
        duplicates=2,
        group=contrasted_processes(),
    )


def _classify(
    name: str, encoder: nn.Module, head: nn.Module, training: Training, data: Loaders, keep: Literal["best", "last"], *, hidden: bool
) -> Stage:
    def forward(batch: Batch) -> Outputs:
        with torch.no_grad():
            features = encoder(batch.images)
        return {"logits": head(features)}

    return Stage(
        name,
        train=(head,),
        frozen=(encoder,),
        forward=forward,
        loss=lambda outputs, batch: {"ce": cross_entropy(outputs["logits"], batch.labels, hidden=hidden)},
        data=data,
        training=training,
        best="val/loss",
        keep=keep,
        couples_rows=hidden,
    )


_NOTEBOOK: Mapping[str, object] = {
    "dataset": "imagenette",
    "teacher_model": "resnet101",
    "student": "resnet18",
    "image_size": 224,
    "augment": "conkd-student",
    "evaluation": "squash",
    "optimizer": "adamw",
    "lr": 6e-4,
    "weight_decay": 0.01,
    "schedule": "cosine",
    "final_lr": 1e-3,
    "epochs": 300,
    "batch_size": 128,
    "teacher_training.optimizer": "adamw",
    "teacher_training.lr": 6e-4,
    "teacher_training.weight_decay": 0.01,
    "teacher_training.schedule": "cosine",
    "teacher_training.final_lr": 1e-3,
    "teacher_training.epochs": 60,
    "teacher_training.batch_size": 64,
}

RECIPE = Recipe(
    name="conkd",
    title="ConKD-Lion: standardized logit distillation with a supervised contrastive term",
    settings=Settings,
    presets={
        "default": Preset(
            "one stage on the whole student: cross-entropy, standardized logits, contrast, all with Lion",
            {"optimizer": "lion", "lr": 1e-3, "weight_decay": 0.1, "schedule": "cosine"},
        ),
        "notebook": Preset(
            "the ConKD-Lion notebooks: Imagenette at 224 px, 300 + 50 epochs, published test accuracy 92.46 %; their quirks on. Their "
            "teacher starts from ImageNet weights: pass --teacher-pretrained or --teacher FILE, else it starts from random weights",
            {**_NOTEBOOK, "procedure": "notebook", "kd_weight": 1.0, "cosine_from_one": True, "keep_last_classifier": True},
        ),
        "readme": Preset(
            "the ConKD-Lion README: standardized KL at T = 2 plus 0.15 SupContrastive on one model, no cross-entropy",
            {**_NOTEBOOK, "procedure": "readme", "kd_weight": 1.0, "ce_weight": 0.0},
        ),
    },
    distil=distil,
    teacher=train_teacher,
    save_teacher=save_teacher,
    load_teacher=load_teacher,
)

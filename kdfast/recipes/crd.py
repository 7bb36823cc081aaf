"""Contrastive representation distillation (Tian, Krishnan, Isola, ICLR 2020, arXiv:1910.10699).

    v = normalize(W features), for student and teacher, features what the classifier reads
    loss = ce_weight CE(s, y) + contrast_weight L [+ kd_weight T^2 KL(t || s)]

L asks of each image's student embedding which row of the teacher's memory bank is that image's, among `negatives` rows of other classes,
and of its teacher embedding the same in the student's bank: CRDLoss has the formula. Both embeddings are trained with the student. The
banks have a row for every training image; they are in the checkpoint, and resume with it. In validation there is no L, for validation
images have no rows. An image whose label is hidden is a class of its own.
"""

from dataclasses import dataclass

import torch
from torch import nn

from kdfast.data import Batch
from kdfast.engine.stage import Outputs, Terms
from kdfast.losses import CRDLoss
from kdfast.models import Taps
from kdfast.recipes import kd
from kdfast.recipes.features import head_input
from kdfast.recipes.recipe import Preset, Recipe, Setup, Stages, Trained, alone_where_hidden


@dataclass(frozen=True)
class Settings(kd.Settings):
    """Hyper-parameters of contrastive representation distillation."""

    contrast_weight: float = 0.8
    """Weight of the contrast."""
    negatives: int = 16384
    """Rows of the other network's bank that an image is compared with, drawn with replacement."""
    contrast_temperature: float = 0.07
    """Temperature of the embeddings' products."""
    embedding: int = 128
    """Numbers in an embedding."""
    bank_momentum: float = 0.5
    """How much of a bank's row stays when its image is seen."""
    kd_weight: float = 0.0
    """Weight of the teacher's logits, which has the factor T^2 already."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contrast_weight < 0:
            raise ValueError(f"contrast_weight must not be negative, got {self.contrast_weight}")
        for name in ("negatives", "embedding"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.contrast_temperature > 0:
            raise ValueError(f"contrast_temperature must be positive, got {self.contrast_temperature}")
        if not 0 <= self.bank_momentum <= 1:
            raise ValueError(f"bank_momentum must be from 0 to 1, got {self.bank_momentum}")


def distil(setup: Setup, settings: Settings, teacher: nn.Module | None) -> Stages[Trained]:
    """One stage: the student's features say as much about an image as the teacher's."""
    assert teacher is not None
    student = setup.student()
    (student_tap, student_features), (teacher_tap, teacher_features) = head_input(student), head_input(teacher)
    see_student, see_teacher = Taps(student, (student_tap,)), Taps(teacher, (teacher_tap,))
    loaders = setup.loaders(setup.training)
    labels = loaders.train.labels
    contrast = CRDLoss(
        student_features,
        teacher_features,
        len(labels),
        labels=alone_where_hidden(labels, torch.arange(len(labels))),
        feat_dim=settings.embedding,
        nce_k=settings.negatives,
        nce_t=settings.contrast_temperature,
        nce_m=settings.bank_momentum,
    )

    def forward(batch: Batch) -> Outputs:
        with torch.no_grad():
            target, (theirs,) = see_teacher(batch.images)
        logits, (ours,) = see_student(batch.images)
        embeddings = {"student embedding": contrast.embed_s(ours), "teacher embedding": contrast.embed_t(theirs)}
        return {"logits": logits, "teacher": target} | embeddings

    def loss(outputs: Outputs, batch: Batch) -> Terms:
        terms = kd.terms(outputs["logits"], outputs["teacher"], batch.labels, settings, hidden=setup.labels_hidden)
        if contrast.training:
            L = contrast.of_embeddings(outputs["student embedding"], outputs["teacher embedding"], batch.index)
            terms["contrast"] = settings.contrast_weight * L
        return terms

    yield setup.stage(
        "distil",
        train=(student, contrast.embed_s, contrast.embed_t),
        frozen=(teacher,),
        memory=(contrast,),
        forward=forward,
        loss=loss,
        data=loaders,
        couples_rows=True,  # the banks are updated once, after the whole batch
    )
    return Trained(student, setup.student_spec)


RECIPE = Recipe(
    name="crd",
    title="Contrastive representation distillation (Tian et al. 2020): the student's features tell images apart as the teacher's do",
    settings=Settings,
    presets={
        "default": Preset("CE + 0.8 contrast with 16,384 negatives of other classes, trained as suits the data set"),
        "dih": Preset(
            "Distilling Knowledge via Intermediate Classifiers, code: CE + 0.9 T^2 KL + 0.8 contrast, lr 0.1, batch 128, 200 epochs, x 0.2 "
            "at 60/120/180 (its README: weight 0.1 for the logits and 0.03 for the contrast, T = 5)",
            {
                **kd.REPDISTILLER,
                "lr": 0.1,
                "batch_size": 128,
                "epochs": 200,
                "milestones": (60, 120, 180),
                "gamma": 0.2,
                "teacher_model": "resnet110",
                "student": "resnet8",
                "temperature": 4.0,
                "kd_weight": 0.9,
                "ce_weight": 1.0,
                "contrast_weight": 0.8,
            },
        ),
        "repdistiller": Preset(
            "RepDistiller's CIFAR-100 tables (Tian et al. 2020): CE + 0.8 contrast; for MobileNet and ShuffleNet its lr is 0.01",
            {**kd.REPDISTILLER, "contrast_weight": 0.8, "ce_weight": 1.0, "kd_weight": 0.0},
        ),
    },
    distil=distil,
)

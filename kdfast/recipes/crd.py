"""Contrastive representation distillation (Tian, Krishnan, Isola, ICLR 2020, arXiv:1910.10699).

Use it when the student's features matter, or when teacher and student have different architectures. The memory banks take a row for
every training image.

    v = normalize(W features), for student and teacher; features are the input of the classifier
    loss = ce_weight CE(s, y) + contrast_weight L [+ kd_weight T^2 KL(t || s)]

L classifies, for each image's student embedding, which row of the teacher's memory bank belongs to the image, among `negatives` rows of
other classes; and the same for the teacher's embedding and the student's bank. `CRDLoss` has the formula. Both embeddings are trained
with the student. Checkpoints hold the banks. Validation images have no rows, so validation has no L. An image with a hidden label is a
class of its own.

Presets: repdistiller (Tian et al. 2020), dih (Asadian, Salehi-Abari 2021).
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from kdfast.data import Batch
from kdfast.engine.ranges import NotNegative, Range, Temperature, UpToOne
from kdfast.engine.stage import Outputs, Terms
from kdfast.losses import CRDLoss
from kdfast.models import Taps
from kdfast.recipes import kd
from kdfast.recipes.features import head_input
from kdfast.recipes.recipe import Preset, Recipe, Setup, Stages, Trained, separate_hidden
from kdfast.recipes.trainings import DIH_CRD, REPDISTILLER


@dataclass(frozen=True)
class Settings(kd.Settings):
    """Hyper-parameters of contrastive representation distillation."""

    contrast_weight: NotNegative = 0.8
    """Weight of the contrast."""
    negatives: Annotated[int, Range("must be at least 1", lambda value: value >= 1, most=2**20)] = 16384
    """Rows of the other network's bank that an image is compared with, drawn with replacement."""
    contrast_temperature: Temperature = 0.07
    """Temperature of the embeddings' products."""
    embedding: Annotated[int, Range("must be at least 1", lambda value: value >= 1, most=2**16)] = 128
    """Numbers in an embedding."""
    bank_momentum: UpToOne = 0.5
    """Weight of the old row when a bank's row is updated."""
    kd_weight: NotNegative = 0.0
    """Weight of the teacher's logits, which has the factor T^2 already."""
    ce_weight: NotNegative = 1.0
    """Weight of the cross-entropy with the labels."""


def distil(setup: Setup, settings: Settings, teacher: nn.Module) -> Stages[Trained]:
    """One stage: the student's features identify an image among others as the teacher's do."""
    student = setup.student()
    (student_tap, student_size), (teacher_tap, teacher_size) = head_input(student), head_input(teacher)
    tap_student, tap_teacher = Taps(student, (student_tap,)), Taps(teacher, (teacher_tap,))
    data = setup.loaders(setup.training)
    labels = data.train.labels
    contrast = CRDLoss(
        student_size,
        teacher_size,
        len(labels),
        labels=separate_hidden(labels, torch.arange(len(labels))),
        feat_dim=settings.embedding,
        nce_k=settings.negatives,
        nce_t=settings.contrast_temperature,
        nce_m=settings.bank_momentum,
    )

    def forward(batch: Batch) -> Outputs:
        with torch.no_grad():
            target, (teacher_features,) = tap_teacher(batch.images)
        logits, (features,) = tap_student(batch.images)
        embeddings = {"student embedding": contrast.embed_s(features), "teacher embedding": contrast.embed_t(teacher_features)}
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
        data=data,
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
            {**DIH_CRD, "temperature": 4.0, "kd_weight": 0.9, "ce_weight": 1.0, "contrast_weight": 0.8},
        ),
        "repdistiller": Preset(
            "RepDistiller's CIFAR-100 tables (Tian et al. 2020): CE + 0.8 contrast; for MobileNet and ShuffleNet its lr is 0.01",
            {**REPDISTILLER, "contrast_weight": 0.8, "ce_weight": 1.0, "kd_weight": 0.0},
        ),
    },
    distil=distil,
)

"""Attention transfer (Zagoruyko, Komodakis, ICLR 2017, arXiv:1612.03928).

Use it when teacher and student have stages of matching resolution and the student should look at the same places.

    A(F) = a / |a|_2 over the pixels, a = mean over channels of F^2
    loss = ce_weight CE(s, y) + attention_weight sum over stages of mean (A(F_s) - A(F_t))^2 [+ kd_weight T^2 KL(t || s)]

If the maps of a stage differ in size, the larger feature tensor is pooled to the smaller size first. Channels may differ.

Presets: repdistiller (Tian et al. 2020).
"""

from dataclasses import dataclass

import torch
from torch import nn

from kdfast.data import Batch
from kdfast.engine.ranges import NotNegative
from kdfast.engine.stage import Outputs, Terms
from kdfast.functional import attention_transfer_loss
from kdfast.recipes import kd
from kdfast.recipes.features import pair_feature_maps
from kdfast.recipes.recipe import Preset, Recipe, Setup, Stages, Trained
from kdfast.recipes.trainings import REPDISTILLER


@dataclass(frozen=True)
class Settings(kd.Settings):
    """Hyper-parameters of attention transfer."""

    attention_weight: NotNegative = 1000.0
    """Weight of the attention maps' term."""
    kd_weight: NotNegative = 0.0
    """Weight of the teacher's logits, which has the factor T^2 already."""
    ce_weight: NotNegative = 1.0
    """Weight of the cross-entropy with the labels."""
    student_stages: tuple[str, ...] = ()
    """Modules of the student whose outputs are compared; none: the ends of its stages."""
    teacher_stages: tuple[str, ...] = ()
    """Modules of the teacher, as many; none: the ends of its stages."""


def distil(setup: Setup, settings: Settings, teacher: nn.Module) -> Stages[Trained]:
    """One stage: the student's attention maps follow the teacher's."""
    student = setup.student()
    student_maps, teacher_maps = pair_feature_maps(student, teacher, settings, setup.data.image_size)
    stages = range(len(student_maps.paths))

    def forward(batch: Batch) -> Outputs:
        with torch.no_grad():
            target, from_teacher = teacher_maps(batch.images)
        logits, from_student = student_maps(batch.images)
        maps = {f"student {i}": F for i, F in enumerate(from_student)} | {f"teacher {i}": F for i, F in enumerate(from_teacher)}
        return {"logits": logits, "teacher": target} | maps

    def loss(outputs: Outputs, batch: Batch) -> Terms:
        from_student, from_teacher = ([outputs[f"{side} {i}"] for i in stages] for side in ("student", "teacher"))
        terms = kd.terms(outputs["logits"], outputs["teacher"], batch.labels, settings, hidden=setup.labels_hidden)
        return terms | {"attention": settings.attention_weight * attention_transfer_loss(from_student, from_teacher)}

    yield setup.stage("distil", train=(student,), frozen=(teacher,), forward=forward, loss=loss)
    return Trained(student, setup.student_spec)


RECIPE = Recipe(
    name="at",
    title="Attention transfer (Zagoruyko, Komodakis 2017): the student's feature maps are strong where the teacher's are",
    settings=Settings,
    presets={
        "default": Preset("CE + 1000 attention maps of all stages, trained as suits the data set"),
        "repdistiller": Preset(
            "RepDistiller's CIFAR-100 tables (Tian et al. 2020): CE + 1000 attention maps; for MobileNet and ShuffleNet its lr is 0.01",
            {**REPDISTILLER, "attention_weight": 1000.0, "ce_weight": 1.0, "kd_weight": 0.0},
        ),
    },
    distil=distil,
)

"""Attention transfer (Zagoruyko, Komodakis, ICLR 2017, arXiv:1612.03928).

    A(F) = a / |a|_2 over the pixels, a = mean over channels of F^2
    loss = ce_weight CE(s, y) + attention_weight sum over stages of mean (A(F_s) - A(F_t))^2 [+ kd_weight T^2 KL(t || s)]

Where a stage's maps differ in size the larger feature tensor is pooled to the smaller size first; channels may differ.
"""

from dataclasses import dataclass

import torch
from torch import nn

from kdfast.data import Batch
from kdfast.engine.stage import Outputs, Terms
from kdfast.functional import attention_transfer_loss
from kdfast.recipes import kd
from kdfast.recipes.features import FeatureMaps, check_as_many
from kdfast.recipes.recipe import Preset, Recipe, Setup, Stages, Trained


@dataclass(frozen=True)
class Settings(kd.Settings):
    """Hyper-parameters of attention transfer."""

    attention_weight: float = 1000.0
    """Weight of the attention maps' term."""
    kd_weight: float = 0.0
    """Weight of the teacher's logits, which has the factor T^2 already."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels."""
    student_stages: tuple[str, ...] = ()
    """Modules of the student whose outputs are compared; none: the ends of its stages."""
    teacher_stages: tuple[str, ...] = ()
    """Modules of the teacher, as many; none: the ends of its stages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_weight < 0:
            raise ValueError(f"attention_weight must not be negative, got {self.attention_weight}")


def distil(setup: Setup, settings: Settings, teacher: nn.Module | None) -> Stages[Trained]:
    """One stage: where the student looks follows where the teacher looks."""
    assert teacher is not None
    student = setup.student()
    see_student = FeatureMaps(student, settings.student_stages, "student_stages", setup.data.image_size)
    see_teacher = FeatureMaps(teacher, settings.teacher_stages, "teacher_stages", setup.data.image_size)
    check_as_many(see_student.paths, see_teacher.paths)
    k = len(see_student.paths)

    def forward(batch: Batch) -> Outputs:
        with torch.no_grad():
            target, theirs = see_teacher(batch.images)
        logits, ours = see_student(batch.images)
        maps = {f"student {i}": F for i, F in enumerate(ours)} | {f"teacher {i}": F for i, F in enumerate(theirs)}
        return {"logits": logits, "teacher": target} | maps

    def loss(outputs: Outputs, batch: Batch) -> Terms:
        ours, theirs = ([outputs[f"{side} {i}"] for i in range(k)] for side in ("student", "teacher"))
        terms = kd.terms(outputs["logits"], outputs["teacher"], batch.labels, settings, hidden=setup.labels_hidden)
        return terms | {"attention": settings.attention_weight * attention_transfer_loss(ours, theirs)}

    yield setup.stage(
        "distil",
        train=(student,),
        frozen=(teacher,),
        forward=forward,
        loss=loss,
    )
    return Trained(student, setup.student_spec)


RECIPE = Recipe(
    name="at",
    title="Attention transfer (Zagoruyko, Komodakis 2017): the student's feature maps are strong where the teacher's are",
    settings=Settings,
    presets={
        "default": Preset("CE + 1000 attention maps of all stages, trained as suits the data set"),
        "repdistiller": Preset(
            "RepDistiller's CIFAR-100 tables (Tian et al. 2020): CE + 1000 attention maps; for MobileNet and ShuffleNet its lr is 0.01",
            {**kd.REPDISTILLER, "attention_weight": 1000.0, "ce_weight": 1.0, "kd_weight": 0.0},
        ),
    },
    distil=distil,
)

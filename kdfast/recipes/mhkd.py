"""MHKD, multi-head knowledge distillation (Wang, Lohit, Jones, Fu 2020, arXiv:2012.02911).

Heads stand on stages of both networks; the teacher's are trained together with the student, on its frozen maps.

    loss = KD(s_0, t_0) + sum over stages j of CE(t_j, y) + head_weight KD(s_j, t_j)
    KD(s, t) = (1 - alpha) CE(s, y) + alpha T^2 KL(t || s); s_0, t_0 the networks' own logits

The original does not stop KD's gradient at t_j, so it also pulls the teacher's heads towards the student's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdfast.data import Batch
from kdfast.engine.stage import Outputs, Terms
from kdfast.models import conv_head
from kdfast.recipes import kd
from kdfast.recipes.features import FeatureMaps, check_as_many, stage_paths
from kdfast.recipes.recipe import Preset, Recipe, Setup, Stages, Trained, ce_and_kd, cross_entropy


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of multi-head distillation."""

    temperature: float = 4.0
    """T, softens both distributions."""
    alpha: float = 0.1
    """Weight of a teacher's term, which has the factor T^2 already; the cross-entropy has 1 - alpha."""
    head_weight: float = 0.5
    """Weight of the heads' distillation."""
    label_smoothing: float = 0.0
    """Label smoothing of the students' cross-entropies."""
    student_stages: tuple[str, ...] = ()
    """Modules of the student that get a head; none: the ends of its stages but the last."""
    teacher_stages: tuple[str, ...] = ()
    """Modules of the teacher that get a head, as many; none: the ends of its stages but the last."""
    head_padding: int = 1
    """Padding of the heads' convolutions; the original's 0 needs maps of at least 5 pixels."""
    pull_teacher_heads: bool = False
    """Quirk of the original: distillation's gradient reaches the teacher's heads."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha}")
        if self.head_weight < 0 or self.head_padding < 0:
            raise ValueError(f"head_weight and head_padding must not be negative, got {self.head_weight} and {self.head_padding}")


def distil(setup: Setup, settings: Settings, teacher: nn.Module | None) -> Stages[Trained]:
    """One stage: heads of both networks and the student."""
    assert teacher is not None
    student = setup.student()
    see_student = _but_the_last(student, settings.student_stages, "student_stages", setup)
    see_teacher = _but_the_last(teacher, settings.teacher_stages, "teacher_stages", setup)
    check_as_many(see_student.paths, see_teacher.paths)
    student_heads, teacher_heads = (_heads(of, setup, settings) for of in (see_student, see_teacher))
    k = len(see_student.paths)

    def forward(batch: Batch) -> Outputs:
        with torch.no_grad():
            target, theirs = see_teacher(batch.images)
        logits, ours = see_student(batch.images)
        outputs = {"logits": logits, "teacher": target}
        outputs |= {f"student {j}": head(F) for j, (head, F) in enumerate(zip(student_heads, ours))}
        return outputs | {f"teacher {j}": head(F) for j, (head, F) in enumerate(zip(teacher_heads, theirs))}

    def distillation(student: Tensor, teacher: Tensor, labels: Tensor, *, of: str = "", weight: float = 1.0) -> Terms:
        parts = ce_and_kd(
            student,
            teacher,
            labels,
            temperature=settings.temperature,
            ce_weight=1 - settings.alpha,
            kd_weight=settings.alpha,
            label_smoothing=settings.label_smoothing,
            hidden=setup.labels_hidden,
        )
        return {f"{of}{name}": weight * part for name, part in parts.items()}

    def loss(outputs: Outputs, batch: Batch) -> Terms:
        terms = dict(distillation(outputs["logits"], outputs["teacher"], batch.labels))
        for j in range(k):
            opinion = outputs[f"teacher {j}"]
            terms[f"teacher {j}"] = cross_entropy(opinion, batch.labels, hidden=setup.labels_hidden)
            target = opinion if settings.pull_teacher_heads else opinion.detach()
            terms |= distillation(outputs[f"student {j}"], target, batch.labels, of=f"head {j} ", weight=settings.head_weight)
        return terms

    yield setup.stage(
        "distil",
        train=(student, student_heads, teacher_heads),
        frozen=(teacher,),
        forward=forward,
        loss=loss,
    )
    return Trained(student, setup.student_spec)


def _but_the_last(network: nn.Module, named: tuple[str, ...], option: str, setup: Setup) -> FeatureMaps:
    return FeatureMaps(network, named or stage_paths(network, option)[:-1], option, setup.data.image_size)


def _heads(of: FeatureMaps, setup: Setup, settings: Settings) -> nn.ModuleList:
    least = 5 if settings.head_padding == 0 else 1
    for path, (_, H, W) in zip(of.paths, of.shapes):
        if min(H, W) < least:
            raise ValueError(f"head_padding 0 needs maps of at least 5 x 5 pixels, and {path} puts out {H} x {W}")
    return nn.ModuleList(conv_head(shape[0], setup.classes, padding=settings.head_padding) for shape in of.shapes)


RECIPE = Recipe(
    name="mhkd",
    title="Multi-head distillation (Wang et al. 2020): heads on the stages of both networks, trained together",
    settings=Settings,
    presets={
        "default": Preset("heads on all stages but the last, T = 4, 0.9 CE + 0.1 T^2 KL each, trained as suits the data set"),
        "dih": Preset(
            "Distilling Knowledge via Intermediate Classifiers' comparison: heads on stages 1 and 2, its README's training; the quirk on",
            {**kd.DIH_README, "pull_teacher_heads": True},
        ),
    },
    distil=distil,
)

"""MHKD, multi-head knowledge distillation (Wang, Lohit, Jones, Fu 2020, arXiv:2012.02911).

Use it when intermediate layers of both networks should agree about the classes and their feature maps cannot be compared directly.

Both networks get heads on their stages. The teacher's heads are trained together with the student, on the teacher's frozen maps.

    loss = KD(s_0, t_0) + sum over stages j of CE(t_j, y) + head_weight KD(s_j, t_j)
    KD(s, t) = (1 - alpha) CE(s, y) + alpha T^2 KL(t || s); s_0, t_0 are the networks' own logits

The original does not stop KD's gradient at t_j, so it also pulls the teacher's heads towards the student's.

Presets: dih (Asadian, Salehi-Abari 2021).
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from kdfast.data import Batch
from kdfast.engine.ranges import Checked, NotNegative, Range, Temperature, UpToOne
from kdfast.engine.stage import Outputs, Terms
from kdfast.models import conv_head
from kdfast.recipes import kd
from kdfast.recipes.features import FeatureMaps, pair_feature_maps
from kdfast.recipes.recipe import Preset, Recipe, Setup, Stages, Trained, cross_entropy
from kdfast.recipes.trainings import DIH_README


@dataclass(frozen=True)
class Settings(Checked):
    """Hyper-parameters of multi-head distillation."""

    temperature: Temperature = 4.0
    """T, softens both distributions."""
    alpha: UpToOne = 0.1
    """Weight of a teacher's term, which has the factor T^2 already; the cross-entropy has 1 - alpha."""
    head_weight: NotNegative = 0.5
    """Weight of the heads' distillation."""
    label_smoothing: UpToOne = 0.0
    """Label smoothing of the students' cross-entropies."""
    student_stages: tuple[str, ...] = ()
    """Modules of the student that get a head; none: the ends of its stages but the last."""
    teacher_stages: tuple[str, ...] = ()
    """Modules of the teacher that get a head, as many; none: the ends of its stages but the last."""
    head_padding: Annotated[int, Range("must not be negative", lambda value: value >= 0, most=64)] = 1
    """Padding of the heads' convolutions; the original's 0 needs maps of at least 5 pixels."""
    pull_teacher_heads: bool = False
    """Quirk of the original: distillation's gradient reaches the teacher's heads."""


def distil(setup: Setup, settings: Settings, teacher: nn.Module) -> Stages[Trained]:
    """One stage: the heads of both networks and the student."""
    student = setup.student()
    student_maps, teacher_maps = pair_feature_maps(student, teacher, settings, setup.data.image_size, drop_last=True)
    alpha, smoothing = settings.alpha, settings.label_smoothing
    weights = kd.Settings(settings.temperature, kd_weight=alpha, ce_weight=1 - alpha, label_smoothing=smoothing)
    student_heads, teacher_heads = (_heads(maps, setup, settings) for maps in (student_maps, teacher_maps))

    def forward(batch: Batch) -> Outputs:
        with torch.no_grad():
            target, from_teacher = teacher_maps(batch.images)
        logits, from_student = student_maps(batch.images)
        outputs = {"logits": logits, "teacher": target}
        outputs |= {f"student {j}": head(F) for j, (head, F) in enumerate(zip(student_heads, from_student))}
        return outputs | {f"teacher {j}": head(F) for j, (head, F) in enumerate(zip(teacher_heads, from_teacher))}

    def distillation(student: Tensor, teacher: Tensor, labels: Tensor, *, prefix: str = "", weight: float = 1.0) -> Terms:
        terms = kd.terms(student, teacher, labels, weights, hidden=setup.labels_hidden)
        return {f"{prefix}{name}": weight * term for name, term in terms.items()}

    def loss(outputs: Outputs, batch: Batch) -> Terms:
        terms = dict(distillation(outputs["logits"], outputs["teacher"], batch.labels))
        for j in range(len(student_heads)):
            target = outputs[f"teacher {j}"]
            terms[f"teacher {j}"] = cross_entropy(target, batch.labels, hidden=setup.labels_hidden)
            target = target if settings.pull_teacher_heads else target.detach()
            terms |= distillation(outputs[f"student {j}"], target, batch.labels, prefix=f"head {j} ", weight=settings.head_weight)
        return terms

    yield setup.stage("distil", train=(student, student_heads, teacher_heads), frozen=(teacher,), forward=forward, loss=loss)
    return Trained(student, setup.student_spec)


def _heads(maps: FeatureMaps, setup: Setup, settings: Settings) -> nn.ModuleList:
    for path, (_, H, W) in zip(maps.paths, maps.shapes):
        if settings.head_padding == 0 and min(H, W) < 5:
            raise ValueError(f"head_padding 0 needs maps of at least 5 x 5 pixels, and {path} puts out {H} x {W}")
    return nn.ModuleList(conv_head(shape[0], setup.classes, padding=settings.head_padding) for shape in maps.shapes)


RECIPE = Recipe(
    name="mhkd",
    title="Multi-head distillation (Wang et al. 2020): heads on the stages of both networks, trained together",
    settings=Settings,
    presets={
        "default": Preset("heads on all stages but the last, T = 4, 0.9 CE + 0.1 T^2 KL each, trained as suits the data set"),
        "dih": Preset(
            "Distilling Knowledge via Intermediate Classifiers' comparison: heads on stages 1 and 2, its README's training; the quirk on",
            {**DIH_README, "pull_teacher_heads": True},
        ),
    },
    distil=distil,
)

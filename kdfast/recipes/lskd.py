"""Logit standardization (Sun, Ren, Li, Wang, Cao, CVPR 2024, arXiv:2403.01427).

Use it when teacher and student have logits of different scale, for example with a very confident teacher: only the shape of the
logits is compared.

    z(x) = (x - mean(x)) / (std(x) + 1e-7), std unbiased
    loss = ce_weight CE(s, y) + kd_weight T^2 KL(softmax(z(t) / T) || softmax(z(s) / T))

Standardized logits are small, so the teacher's term needs a much larger weight than in plain distillation: 9 instead of 0.9.

Presets: cifar100, cifar100-<teacher>-<student> and imagenet (the authors' tables).
"""

from dataclasses import dataclass

from torch import nn

from kdfast.engine.ranges import NotNegative, Temperature
from kdfast.recipes import kd
from kdfast.recipes.recipe import Preset, Recipe, Setup, Stages, Trained
from kdfast.recipes.trainings import IMAGENET, REPDISTILLER


@dataclass(frozen=True)
class Settings(kd.Settings):
    """Hyper-parameters of logit distillation, with the paper's values."""

    temperature: Temperature = 2.0
    """T, over the standardized logits."""
    kd_weight: NotNegative = 9.0
    """Weight of the teacher's term, which has the factor T^2 already."""
    ce_weight: NotNegative = 0.1
    """Weight of the cross-entropy with the labels."""
    standardize: bool = True
    """Standardize each row of logits first."""


def distil(setup: Setup, settings: Settings, teacher: nn.Module) -> Stages[Trained]:
    """One stage: the student follows the teacher's standardized logits."""
    T = settings.temperature
    setup.say(
        f"  effective weights: {settings.ce_weight:g} CE + {settings.kd_weight:g} x T^2 = {settings.kd_weight * T * T:g} KL at T = {T:g}"
    )
    if settings.kd_weight < 1:
        setup.say(f"  warning: kd_weight {settings.kd_weight:g} suits raw logits; standardized ones want about 9, or accuracy drops")
    return (yield from kd.distil(setup, settings, teacher))


def _cifar100(pair: str, temperature: float, weight: float, teacher: str, student: str, **more: object) -> Preset:
    values = {"temperature": temperature, "kd_weight": weight, "ce_weight": 0.1, "teacher_model": teacher, "student": student, **more}
    return Preset(f"the authors' CIFAR-100 table, {pair}: T = {temperature:g}, weight {weight:g}", {**REPDISTILLER, **values})


RECIPE = Recipe(
    name="lskd",
    title="Logit standardization (Sun et al. 2024): the student follows the shape of the teacher's logits, not their scale",
    settings=Settings,
    presets={
        "default": Preset("T = 2, 0.1 CE + 9 T^2 KL, trained as suits the data set"),
        "cifar100": _cifar100("most pairs", 2.0, 9.0, "resnet32x4", "resnet8x4"),
        "cifar100-resnet110-resnet20": _cifar100("ResNet-110 to ResNet-20", 4.0, 12.0, "resnet110", "resnet20"),
        "cifar100-vgg13-vgg8": _cifar100("VGG-13 to VGG-8", 3.0, 9.0, "vgg13_cifar", "vgg8_cifar"),
        "cifar100-resnet50-mobilenetv2": _cifar100("ResNet-50 to MobileNetV2", 3.0, 1.0, "resnet50_cifar", "mobilenetv2_cifar", lr=0.01),
        "imagenet": Preset(
            "the authors' ImageNet table: T = 2, weight 9, CE 1",
            {**IMAGENET, "temperature": 2.0, "kd_weight": 9.0, "ce_weight": 1.0},
        ),
    },
    distil=distil,
)

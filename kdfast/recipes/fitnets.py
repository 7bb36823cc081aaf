"""FitNets (Romero et al., ICLR 2015, arXiv:1412.6550): the student's middle learns the teacher's middle.

    stages    the paper's two trainings (the default). First the hint: the student up to `student_hint` learns
              mean (regressor(F_s) - F_t)^2. Then distillation of the logits, kd.py's loss, with a fresh optimizer.
    joint     RepDistiller's one: loss = ce_weight CE(s, y) + hint_weight mean (regressor(F_s) - F_t)^2 [+ kd_weight T^2 KL(t || s)]

The regressor, a convolution with BatchNorm and ReLU, takes the student's map to the teacher's shape and is trained with it.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from kdfast import functional
from kdfast.data import Batch
from kdfast.engine import Stage, Training
from kdfast.engine.stage import Outputs, Terms
from kdfast.losses import HintLoss
from kdfast.recipes import kd
from kdfast.recipes.features import FeatureMaps, stage_paths
from kdfast.recipes.recipe import Preset, Recipe, Setup, Stages, Trained


@dataclass(frozen=True)
class Settings(kd.Settings):
    """Hyper-parameters of FitNets."""

    procedure: Literal["stages", "joint"] = "stages"
    """Hint first and then the logits, or both at once."""
    student_hint: str | None = None
    """Module of the student whose output learns; none: its middle stage."""
    teacher_hint: str | None = None
    """Module of the teacher whose output teaches; none: its middle stage."""
    regressor: bool = True
    """A trained convolution between the two; without it their shapes must be equal."""
    hint_epochs: int | None = None
    """Epochs of the hint (stages); none: a fifth of those that follow."""
    hint_weight: float = 100.0
    """Weight of the hint (joint)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hint_weight < 0:
            raise ValueError(f"hint_weight must not be negative, got {self.hint_weight}")
        if self.hint_epochs is not None and self.hint_epochs < 1:
            raise ValueError(f"hint_epochs must be at least 1, got {self.hint_epochs}")


def distil(setup: Setup, settings: Settings, teacher: nn.Module | None) -> Stages[Trained]:
    """The stages of the chosen procedure."""
    assert teacher is not None
    student = setup.student()
    see_student = _hint(student, settings.student_hint, "student_hint", setup)
    see_teacher = _hint(teacher, settings.teacher_hint, "teacher_hint", setup)
    hint_loss = HintLoss(see_student.shapes[0], see_teacher.shapes[0], regressor=settings.regressor)  # type: ignore[arg-type]

    def forward(batch: Batch) -> Outputs:
        with torch.no_grad():
            target, (theirs,) = see_teacher(batch.images)
        logits, (ours,) = see_student(batch.images)
        return {"logits": logits, "teacher": target, "hint": hint_loss.regressor(ours), "teacher hint": theirs}

    def hint(outputs: Outputs) -> Tensor:
        return functional.hint_loss(outputs["hint"], outputs["teacher hint"])

    def both(outputs: Outputs, batch: Batch) -> Terms:
        logits = kd.terms(outputs["logits"], outputs["teacher"], batch.labels, settings, hidden=setup.labels_hidden)
        return logits | {"hint": settings.hint_weight * hint(outputs)}

    if settings.procedure == "joint":
        yield setup.stage(
            "distil",
            train=(student, hint_loss),
            frozen=(teacher,),
            forward=forward,
            loss=both,
        )
        return Trained(student, setup.student_spec)

    training = _of_the_hint(setup.training, settings)
    yield Stage(
        "hint",
        train=(student, hint_loss),
        frozen=(teacher,),
        forward=lambda batch: {name: value for name, value in forward(batch).items() if "hint" in name},
        loss=lambda outputs, batch: {"hint": hint(outputs)},
        data=setup.loaders(training),
        training=training,
        best="val/hint",
        partial=True,
    )
    return (yield from kd.follow("distil", setup, settings, student, setup.student_spec, teacher))


def _hint(network: nn.Module, named: str | None, option: str, setup: Setup) -> FeatureMaps:
    """The network and the one map that is compared: the one named, else the end of its middle stage."""
    if named is None:
        stages = stage_paths(network, option)
        named = stages[(len(stages) - 1) // 2]
    return FeatureMaps(network, (named,), option, setup.data.image_size)


def _of_the_hint(training: Training, settings: Settings) -> Training:
    """The same optimizer at a constant rate."""
    epochs = settings.hint_epochs or max(1, training.epochs // 5)
    return replace(training, epochs=epochs, schedule="constant", warmup=min(training.warmup, epochs - 1), early_stop=None)


RECIPE = Recipe(
    name="fitnets",
    title="FitNets (Romero et al. 2015): the middle of the student learns the middle of the teacher, then its logits",
    settings=Settings,
    presets={
        "default": Preset("a hint for a fifth of the epochs, then T = 4, 0.1 CE + 0.9 T^2 KL, trained as suits the data set"),
        "dih": Preset(
            "Distilling Knowledge via Intermediate Classifiers: 40 epochs of layer1's maps as they are, then its KD (its README's values)",
            {
                **kd.DIH_README,
                "temperature": 5.0,
                "kd_weight": 0.1,
                "ce_weight": 0.9,
                "student_hint": "layer1",
                "teacher_hint": "layer1",
                "regressor": False,
                "hint_epochs": 40,
            },
        ),
        "repdistiller": Preset(
            "RepDistiller's CIFAR-100 tables (Tian et al. 2020): CE + 100 hint at the end of stage 2 at once, no logits",
            {**kd.REPDISTILLER, "procedure": "joint", "hint_weight": 100.0, "ce_weight": 1.0, "kd_weight": 0.0},
        ),
    },
    distil=distil,
)

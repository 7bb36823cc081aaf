"""FitNets (Romero et al., ICLR 2015, arXiv:1412.6550): the middle of the student learns the middle of the teacher.

Use it when the student is thinner or deeper than the teacher and training from the logits alone starts slowly.

    stages    the paper's two trainings (the default). First the hint: the student up to `student_hint` learns
              mean (regressor(F_s) - F_t)^2. Then distillation of the logits, kd.py's loss, with a new optimizer.
    joint     RepDistiller's single training: loss = ce_weight CE(s, y) + hint_weight mean (regressor(F_s) - F_t)^2
              [+ kd_weight T^2 KL(t || s)]

The regressor, a convolution with BatchNorm and ReLU, maps the student's features to the teacher's shape. It is trained with the student.

Presets: dih (Asadian, Salehi-Abari 2021), repdistiller (Tian et al. 2020).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from kdfast import functional
from kdfast.data import Batch
from kdfast.engine import Stage, Training
from kdfast.engine.ranges import AtLeastOne, NotNegative
from kdfast.engine.stage import Outputs, Terms
from kdfast.losses import HintLoss
from kdfast.recipes import kd
from kdfast.recipes.features import FeatureMaps, middle_stage
from kdfast.recipes.recipe import Preset, Recipe, Setup, Stages, Trained
from kdfast.recipes.trainings import DIH_README, REPDISTILLER


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
    hint_epochs: AtLeastOne | None = None
    """Epochs of the hint (stages); none: a fifth of the epochs that follow."""
    hint_weight: NotNegative = 100.0
    """Weight of the hint (joint)."""

    def idle(self) -> dict[str, str]:
        """Returns the settings that the procedure does not use, each with the reason."""
        return {"hint_epochs" if self.procedure == "joint" else "hint_weight": f"with procedure {self.procedure}"}


def distil(setup: Setup, settings: Settings, teacher: nn.Module) -> Stages[Trained]:
    """The stages of the chosen procedure."""
    student, size = setup.student(), setup.data.image_size
    student_map = FeatureMaps(student, (settings.student_hint or middle_stage(student, "student_hint"),), "student_hint", size)
    teacher_map = FeatureMaps(teacher, (settings.teacher_hint or middle_stage(teacher, "teacher_hint"),), "teacher_hint", size)
    hint_loss = HintLoss(student_map.shapes[0], teacher_map.shapes[0], regressor=settings.regressor)  # type: ignore[arg-type]

    def forward(batch: Batch) -> Outputs:
        with torch.no_grad():
            target, (teacher_hint,) = teacher_map(batch.images)
        logits, (features,) = student_map(batch.images)
        return {"logits": logits, "teacher": target, "hint": hint_loss.regressor(features), "teacher hint": teacher_hint}

    def hint(outputs: Outputs) -> Tensor:
        return functional.hint_loss(outputs["hint"], outputs["teacher hint"])

    def joint(outputs: Outputs, batch: Batch) -> Terms:
        terms = kd.terms(outputs["logits"], outputs["teacher"], batch.labels, settings, hidden=setup.labels_hidden)
        return terms | {"hint": settings.hint_weight * hint(outputs)}

    if settings.procedure == "joint":
        yield setup.stage("distil", train=(student, hint_loss), frozen=(teacher,), forward=forward, loss=joint)
        return Trained(student, setup.student_spec)

    training = _hint_training(setup.training, settings)
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


def _hint_training(training: Training, settings: Settings) -> Training:
    """The same optimizer at a constant rate."""
    epochs = settings.hint_epochs or max(1, training.epochs // 5)
    return replace(training, epochs=epochs, schedule="constant", early_stop=None)


_LAYER1 = {"student_hint": "layer1", "teacher_hint": "layer1", "regressor": False, "hint_epochs": 40}

RECIPE = Recipe(
    name="fitnets",
    title="FitNets (Romero et al. 2015): the middle of the student learns the middle of the teacher, then its logits",
    settings=Settings,
    presets={
        "default": Preset("a hint for a fifth of the epochs, then T = 4, 0.1 CE + 0.9 T^2 KL, trained as suits the data set"),
        "dih": Preset(
            "Distilling Knowledge via Intermediate Classifiers: 40 epochs of layer1's maps as they are, then its KD (its README's values)",
            {**DIH_README, **_LAYER1, "temperature": 5.0, "kd_weight": 0.1, "ce_weight": 0.9},
        ),
        "repdistiller": Preset(
            "RepDistiller's CIFAR-100 tables (Tian et al. 2020): CE + 100 hint at the end of stage 2 at once, no logits",
            {**REPDISTILLER, "procedure": "joint", "hint_weight": 100.0, "ce_weight": 1.0, "kd_weight": 0.0},
        ),
    },
    distil=distil,
)

"""Self-distillation: a network's deep feature map teaches its own shallow one ("Knowledge Distillation Implementation", part 3).

Use it when there is no teacher.

    loss = alpha MSE(bilinear(shallow -> size of deep), conv1x1(deep)) + (1 - alpha) CE(logits, y)

The shallow map (the output of `shallow`) follows a learned projection of the deep one (the output of `deep`).

Presets: tutorial (with its quirks).
"""

from dataclasses import dataclass

from torch import nn

from kdfast.data import Batch
from kdfast.engine.ranges import Checked, UpToOne
from kdfast.engine.stage import Outputs, Terms
from kdfast.losses import SelfDistillationLoss
from kdfast.recipes.features import FeatureMaps, middle_stage, stage_paths
from kdfast.recipes.recipe import Preset, Recipe, Setup, Stages, Trained, cross_entropy
from kdfast.recipes.trainings import Values


@dataclass(frozen=True)
class Settings(Checked):
    """Hyper-parameters of self-distillation."""

    alpha: UpToOne = 0.5
    """Weight of the feature term; the cross-entropy has 1 - alpha."""
    label_smoothing: UpToOne = 0.0
    """Label smoothing of the cross-entropy."""
    shallow: str | None = None
    """Module whose output learns; None: the middle stage."""
    deep: str | None = None
    """Module whose output teaches; None: the last stage."""
    detach_deep: bool = True
    """Stop the feature term's gradient at the deep map, so that the map teaches and does not follow."""
    train_projection: bool = True
    """Train the 1x1 convolution; the tutorial leaves it out of its optimizer."""
    best_by_training_accuracy: bool = False
    """Keep the epoch with the highest training accuracy, as the tutorial does, not the highest validation accuracy."""


def distil(setup: Setup, settings: Settings, teacher: nn.Module | None) -> Stages[Trained]:
    """One stage: cross-entropy and the feature term."""
    student, size = setup.student(), setup.data.image_size
    paths = settings.shallow or middle_stage(student, "shallow"), settings.deep or stage_paths(student, "deep")[-1]
    tapped = FeatureMaps(student, paths, "shallow and deep", size)
    (shallow_channels, *_), (deep_channels, *_) = tapped.shapes
    feature_loss = SelfDistillationLoss(settings.alpha, shallow_channels, deep_channels, detach_teacher=settings.detach_deep)
    trained, frozen = ((student, feature_loss), ()) if settings.train_projection else ((student,), (feature_loss,))

    def forward(batch: Batch) -> Outputs:
        logits, (shallow, deep) = tapped(batch.images)
        return {"logits": logits, "shallow": shallow, "deep": deep}

    def loss(outputs: Outputs, batch: Batch) -> Terms:
        features = feature_loss.feature_term(outputs["shallow"], outputs["deep"])
        ce = cross_entropy(outputs["logits"], batch.labels, label_smoothing=settings.label_smoothing, hidden=setup.labels_hidden)
        return {"feature": settings.alpha * features, "ce": (1 - settings.alpha) * ce}

    best = "train/top1" if settings.best_by_training_accuracy else "val/top1"
    yield setup.stage("distil", train=trained, frozen=frozen, forward=forward, loss=loss, best=best)
    return Trained(student, setup.student_spec)


_TUTORIAL: Values = (
    {"dataset": "imagenette", "student": "resnet18", "pretrained": True, "val_fraction": 0.0}
    | {"image_size": 224, "augment": "imagenet", "evaluation": "center-crop"}
    | {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.0, "schedule": "constant", "epochs": 5, "batch_size": 32}
    | {"shallow": "layer2.1", "deep": "layer4.1"}
    | {"detach_deep": False, "train_projection": False, "best_by_training_accuracy": True}
)

RECIPE = Recipe(
    name="self_distillation",
    title="Self-distillation: a network's deep features teach its shallow ones",
    settings=Settings,
    presets={
        "default": Preset("alpha = 0.5, the projection trained, the deep map detached"),
        "tutorial": Preset(
            "the tutorial 'Knowledge Distillation Implementation 3/3': ResNet-18 with ImageNet weights, 5 epochs; its quirks on", _TUTORIAL
        ),
    },
    distil=distil,
    needs_teacher=False,
)

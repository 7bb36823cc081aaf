"""Training on labels alone: the teacher where none is given, and the student that distillation is compared with."""

from torch import nn

from kdfast.data import Loaders
from kdfast.engine import Stage, Training
from kdfast.recipes.recipe import Setup, Stages, Trained, cross_entropy


def supervised(
    name: str, model: nn.Module, data: Loaders, training: Training, *, label_smoothing: float = 0.0, hidden: bool = False
) -> Stages[nn.Module]:
    """One stage that trains `model` (images -> logits) with cross-entropy.

    `hidden` says that some labels are: the mean over those that are not then couples the rows of a batch.
    """
    yield Stage(
        name,
        train=(model,),
        forward=lambda batch: {"logits": model(batch.images)},
        loss=lambda outputs, batch: {"ce": cross_entropy(outputs["logits"], batch.labels, label_smoothing=label_smoothing)},
        data=data,
        training=training,
        couples_rows=hidden,
    )
    return model


def teacher(setup: Setup, settings: object, given: Trained | None) -> Stages[Trained]:
    """The given teacher as it is, or one trained on all labels; the method's own settings have no part in it."""
    if given is not None:
        return given
    data = setup.loaders(setup.teacher_training, all_labels=True)
    model = yield from supervised("teacher", setup.new_teacher(), data, setup.teacher_training)
    return Trained(model, setup.teacher_spec)


def alone(setup: Setup, *, label_smoothing: float = 0.0) -> Stages[Trained]:
    """The student without a teacher: the same initial weights, images, labels, augmentation, optimizer and epochs."""
    data = setup.loaders(setup.training)
    model = yield from supervised(
        "alone", setup.student(), data, setup.training, label_smoothing=label_smoothing, hidden=setup.labels_hidden
    )
    return Trained(model, setup.student_spec)

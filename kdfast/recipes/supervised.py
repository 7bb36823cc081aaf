"""Training on labels alone: the teacher if none is given, a teacher's heads, and the student that distillation is compared with."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from kdfast.data import Loaders
from kdfast.engine import Stage, Training
from kdfast.recipes.recipe import Setup, Stages, Trained, cross_entropy

HEADS = "teacher/heads"  # the stage that trains classifiers on a teacher's maps


def supervised(
    name: str, model: nn.Module, data: Loaders, training: Training, *, label_smoothing: float = 0.0, hidden: bool = False
) -> Stages[nn.Module]:
    """One stage that trains `model` (images -> logits) with cross-entropy.

    `hidden` says that some labels are hidden: the mean over the others couples the rows of a batch.
    """
    yield Stage(
        name,
        train=(model,),
        forward=lambda batch: {"logits": model(batch.images)},
        loss=lambda outputs, batch: {"ce": cross_entropy(outputs["logits"], batch.labels, label_smoothing=label_smoothing, hidden=hidden)},
        data=data,
        training=training,
        couples_rows=hidden,
    )
    return model


def train_heads(
    setup: Setup,
    model: nn.Module,
    heads: nn.Module,
    predict: Callable[[Tensor], Sequence[Tensor]],
    names: Sequence[str],
    *,
    metadata: Mapping[str, str] | None = None,
) -> Stages[None]:
    """One stage, HEADS, that trains classifiers on the maps of the frozen `model` with the sum of their cross-entropies.

    Args:
        setup: of the run; all labels are shown.
        model: the teacher's network.
        heads: the classifiers, one module.
        predict: images -> logits [B, C] of each classifier.
        names: of the classifiers, for metrics and the printed accuracies.
        metadata: written into the file of their weights.
    """
    result = yield Stage(
        HEADS,
        train=(heads,),
        frozen=(model,),
        forward=lambda batch: {f"logits/{name}": logits for name, logits in zip(names, predict(batch.images))},
        loss=lambda outputs, batch: {f"ce/{name}": cross_entropy(outputs[f"logits/{name}"], batch.labels, hidden=False) for name in names},
        data=setup.loaders(setup.teacher_training, all_labels=True),
        training=setup.teacher_training,
        best="val/loss",
        metadata=metadata or {},
    )
    top1 = (f"{name} {100 * result.metrics[f'val/top1/{name}']:.2f} %" for name in names)
    setup.say(f"  heads, validation top-1: {', '.join(top1)}")


def teacher(setup: Setup, settings: object, given: Trained | None) -> Stages[Trained]:
    """Returns the given teacher, or trains one on all labels; the method's own settings are not used."""
    if given is not None:
        return given
    data = setup.loaders(setup.teacher_training, all_labels=True)
    model = yield from supervised("teacher", setup.new_teacher(), data, setup.teacher_training)
    return Trained(model, setup.teacher_spec)


def alone(setup: Setup, *, label_smoothing: float = 0.0) -> Stages[Trained]:
    """Trains the student without a teacher: the same initial weights, images, labels, augmentation, optimizer and epochs."""
    data = setup.loaders(setup.training)
    hidden = setup.labels_hidden
    model = yield from supervised("alone", setup.student(), data, setup.training, label_smoothing=label_smoothing, hidden=hidden)
    return Trained(model, setup.student_spec)

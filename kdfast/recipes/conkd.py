"""ConKD-Lion: logit standardization with a supervised contrastive term, and Lion.

Use it when the student's features matter beyond its classes, for example for retrieval, or when batches are large enough that every
class occurs several times.

There are three procedures:

    joint (the default)   one stage on the whole student:
                          loss = ce_weight CE(s, y) + kd_weight T^2 KL(z(t) || z(s)) + alpha SupCon(projection(features), y)
    readme                the project's README: loss = T^2 KL(z(t) || z(s)) + alpha SupContrastive(features, y), no cross-entropy
    notebook              the project's notebooks, in two stages: the encoder learns the teacher's embedding, whose 128 numbers
                          are treated as logits, loss = T^2 KL(z(t) || z(s)) + alpha SupCon(the embedding twice, as two views);
                          then a classifier is trained on the frozen encoder, with Lion. The teacher is trained in the same way:
                          SupCon on its embedding, then a linear classifier.

z is standardization (lskd.py), T the temperature. In `joint` an image with a hidden label takes the teacher's most likely class; in the
other procedures it is alone in its class. With several processes an image is contrasted with the images of all of them, as in one
process; in validation with the images of its own process.

Presets: notebook and readme (the project's notebooks and README).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdfast.data import HIDDEN, Batch, Loaders
from kdfast.engine import Stage, Training
from kdfast.engine.ranges import AtLeastOne, Checked, NotNegative, Positive, Temperature, UpToOne
from kdfast.engine.stage import Outputs, Terms, lr_factor
from kdfast.functional import kd_loss, supcon_loss
from kdfast.models import Taps, classifier_head, feature_size, projection_head, replace_head
from kdfast.recipes import kd, recipe, supervised
from kdfast.recipes.features import head_input
from kdfast.recipes.recipe import Extended, Preset, Recipe, Setup, Stages, Trained
from kdfast.recipes.remembered import Remembered
from kdfast.recipes.trainings import Values

EMBEDDING = 128  # numbers in the embedding of an image


@dataclass(frozen=True)
class Settings(Checked):
    """Hyper-parameters of ConKD."""

    procedure: Literal["joint", "readme", "notebook"] = "joint"
    """One of the three procedures."""
    alpha: NotNegative = 0.15
    """Weight of the contrastive term."""
    temperature: Temperature = 2.0
    """T, over the standardized logits (notebook: over the standardized embedding)."""
    contrast_temperature: Temperature = 0.07
    """Temperature of the contrastive term."""
    kd_weight: NotNegative = 9.0
    """Weight of the teacher's term, which has the factor T^2 already; standardized logits want about 9 (lskd.py)."""
    ce_weight: NotNegative = 1.0
    """Weight of the cross-entropy (joint)."""
    label_smoothing: UpToOne = 0.0
    """Label smoothing of the cross-entropy (joint)."""
    classify_epochs: AtLeastOne = 50
    """Epochs of the student's classifier (notebook)."""
    classify_lr: Positive = 1e-4
    """Learning rate of the student's classifier, with Lion (notebook)."""
    classify_weight_decay: NotNegative = 1e-4
    """Weight decay of the student's classifier (notebook)."""
    teacher_classify_epochs: AtLeastOne = 40
    """Epochs of the teacher's classifier, with AdamW (notebook)."""
    teacher_classify_lr: Positive = 5e-4
    """Learning rate of the teacher's classifier (notebook)."""
    cosine_from_one: bool = False
    """Quirk of the notebooks: their cosine counts epochs from 1, so the first epoch is already below the full rate."""
    keep_last_classifier: bool = False
    """Quirk of the notebooks: the last epoch's classifier is tested, not the best."""

    def idle(self) -> dict[str, str]:
        """Returns the settings that the procedure does not use, each with the reason."""
        notebook = {"classify_epochs", "classify_lr", "classify_weight_decay", "teacher_classify_epochs", "teacher_classify_lr"}
        notebook |= {"cosine_from_one", "keep_last_classifier"}
        used = {"joint": {"ce_weight", "label_smoothing"}, "readme": set[str](), "notebook": notebook}
        others = set[str]().union(*used.values()) - used[self.procedure]
        return dict.fromkeys(others, f"with procedure {self.procedure}")


class EmbeddingTeacher(Extended):
    """A classifier with the projection that its features were trained with.

    Args:
        model: images -> logits.
        projection: features -> embedding of length 1.
    """

    def __init__(self, model: nn.Module, projection: nn.Module):
        super().__init__(model)
        self.projection = projection
        self._tapped = Taps(model, (head_input(model)[0],))

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> embedding [B, 128], rows of length 1."""
        _, (features,) = self._tapped(images)
        return self.projection(features)


def distil(setup: Setup, settings: Settings, teacher: nn.Module) -> Stages[Trained]:
    """The stages of the chosen procedure."""
    if settings.procedure == "notebook":
        assert isinstance(teacher, EmbeddingTeacher)
        return (yield from _notebook(setup, settings, teacher))
    return (yield from _joint(setup, settings, teacher))


def _joint(setup: Setup, settings: Settings, teacher: nn.Module) -> Stages[Trained]:
    student = setup.student()
    readme = settings.procedure == "readme"
    ce_weight = 0.0 if readme else settings.ce_weight
    weights = kd.Settings(settings.temperature, settings.kd_weight, ce_weight, standardize=True, label_smoothing=settings.label_smoothing)
    tap, features = head_input(student)
    projection = nn.Identity() if readme else projection_head(features, EMBEDDING)
    tapped = Taps(student, (tap,))
    data = setup.loaders(setup.training)
    targets = Remembered(teacher, data, setup.training.epochs)

    def forward(batch: Batch) -> Outputs:
        target = targets(batch, training=student.training)
        logits, (features,) = tapped(batch.images)
        return {"logits": logits, "embedding": projection(features.flatten(1)), "teacher": target}

    def loss(outputs: Outputs, batch: Batch) -> Terms:
        terms = kd.terms(outputs["logits"], outputs["teacher"], batch.labels, weights, hidden=setup.labels_hidden)
        if readme:
            classes = recipe.separate_hidden(batch.labels, batch.index)
        else:
            classes = torch.where(batch.labels == HIDDEN, outputs["teacher"].argmax(dim=1), batch.labels)
        contrast = supcon_loss(
            outputs["embedding"],
            classes,
            temperature=settings.contrast_temperature,
            self_positive=readme,
            normalize=readme,
            group=recipe.contrast_group(),
        )
        return terms | {"supcon": settings.alpha * contrast}

    yield setup.stage(
        "distil",
        train=(student, projection),
        frozen=(teacher,),
        data=data,
        prepare=targets.prepare,
        forward=forward,
        loss=loss,
        couples_rows=True,
    )
    return Trained(student, setup.student_spec)


def _notebook(setup: Setup, settings: Settings, teacher: EmbeddingTeacher) -> Stages[Trained]:
    encoder = setup.student(head="none")
    projection = projection_head(feature_size(encoder), EMBEDDING)

    def forward(batch: Batch) -> Outputs:
        with torch.no_grad():
            target = teacher.embed(batch.images)
        return {"embedding": projection(encoder(batch.images)), "teacher": target}

    def loss(outputs: Outputs, batch: Batch) -> Terms:
        lskd = kd_loss(outputs["embedding"], outputs["teacher"], temperature=settings.temperature, standardize=True)
        contrast = _contrast_twice(outputs["embedding"], batch, settings)
        return {"lskd": settings.kd_weight * lskd, "supcon": settings.alpha * contrast}

    yield setup.stage(
        "distil",
        train=(encoder, projection),
        frozen=(teacher,),
        forward=forward,
        loss=loss,
        best="val/loss",
        couples_rows=True,
        lr_factor=_lr_factor_from_one if settings.cosine_from_one else lr_factor,
    )

    head = classifier_head(feature_size(encoder), setup.classes)
    training = _classifier_training(setup.training, settings.classify_epochs, "lion", settings.classify_lr)
    # plateau: a tenth of the rate after 3 epochs without improvement
    training = replace(training, weight_decay=settings.classify_weight_decay, schedule="plateau", early_stop=5)
    stage = _classify("classify", encoder, head, setup.loaders(training), training, hidden=setup.labels_hidden)
    yield replace(stage, keep="last" if settings.keep_last_classifier else "best")
    return Trained(replace_head(encoder, head), replace(setup.student_spec, head="mlp"))


def train_teacher(setup: Setup, settings: Settings, given: Trained | None) -> Stages[Trained]:
    """The notebook's teacher: a contrastive stage, from the given weights if there are any, then a linear classifier."""
    if settings.procedure != "notebook":
        return (yield from supervised.teacher(setup, settings, given))
    if given is not None and isinstance(given.model, EmbeddingTeacher):
        return given

    encoder, spec = given if given is not None else (setup.new_teacher(), setup.teacher_spec)
    features = feature_size(encoder)
    replace_head(encoder, nn.Identity())
    projection = projection_head(features, EMBEDDING)
    yield Stage(
        "teacher/contrast",
        train=(encoder, projection),
        forward=lambda batch: {"embedding": projection(encoder(batch.images))},
        loss=lambda outputs, batch: {"supcon": _contrast_twice(outputs["embedding"], batch, settings)},
        data=setup.loaders(setup.teacher_training, augment="conkd-teacher", all_labels=True),
        training=setup.teacher_training,
        best="val/loss",
        couples_rows=True,
        lr_factor=_lr_factor_from_one if settings.cosine_from_one else lr_factor,
    )

    head = nn.Linear(features, setup.classes)
    epochs, lr = settings.teacher_classify_epochs, settings.teacher_classify_lr
    training = replace(_classifier_training(setup.teacher_training, epochs, "adamw", lr), weight_decay=0.01)
    data = setup.loaders(training, augment="conkd-teacher", all_labels=True)
    yield _classify("teacher/classify", encoder, head, data, training, hidden=False)
    return Trained(EmbeddingTeacher(replace_head(encoder, head), projection), spec)


def save_teacher(teacher: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the network's weights and, if the teacher has one, its projection."""
    tensors, facts = recipe.save_network(teacher)
    if isinstance(teacher, EmbeddingTeacher):
        tensors |= {f"projection.{name}": value for name, value in teacher.projection.state_dict().items()}
        facts["projection"] = str(EMBEDDING)
    return tensors, facts


def load_teacher(network: nn.Module, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> nn.Module:
    """Returns the network, with its projection if its file holds one."""
    if "projection" not in facts:
        return network
    projection = projection_head(head_input(network)[1], int(facts["projection"]))
    projection.load_state_dict({name.removeprefix("projection."): t for name, t in tensors.items() if name.startswith("projection.")})
    return EmbeddingTeacher(network, projection)


def _lr_factor_from_one(training: Training, epoch: int) -> float:
    """The notebooks' learning rate: the cosine counts epochs from 1."""
    return lr_factor(training, epoch + (training.schedule == "cosine" and epoch >= training.warmup_epochs))


def _contrast_twice(embedding: Tensor, batch: Batch, settings: Settings) -> Tensor:
    """SupCon of the embedding given twice, as two views."""
    classes = recipe.separate_hidden(batch.labels, batch.index)
    return supcon_loss(embedding, classes, temperature=settings.contrast_temperature, duplicates=2, group=recipe.contrast_group())


def _classifier_training(encoder: Training, epochs: int, optimizer: Literal["adamw", "lion"], lr: float) -> Training:
    """The training of a classifier in batches as large as the encoder's, at a constant rate."""
    size, micro = encoder.batch_size, encoder.micro_batch
    return Training(epochs, size, micro, optimizer=optimizer, lr=lr, schedule="constant")


def _classify(name: str, encoder: nn.Module, head: nn.Module, data: Loaders, training: Training, *, hidden: bool) -> Stage:
    """A stage that trains a classifier on the frozen encoder."""

    def forward(batch: Batch) -> Outputs:
        with torch.no_grad():
            features = encoder(batch.images)
        return {"logits": head(features)}

    (stage,) = supervised.supervised(name, head, data, training, hidden=hidden)
    return replace(stage, frozen=(encoder,), forward=forward, best="val/loss")


_NOTEBOOK: Values = (
    {"dataset": "imagenette", "teacher_model": "resnet101", "student": "resnet18"}
    | {"image_size": 224, "augment": "conkd-student", "evaluation": "squash"}
    | {"optimizer": "adamw", "lr": 6e-4, "weight_decay": 0.01, "schedule": "cosine", "final_lr": 1e-3, "epochs": 300, "batch_size": 128}
    | {"teacher_training.epochs": 60, "teacher_training.batch_size": 64}
)

RECIPE = Recipe(
    name="conkd",
    title="ConKD-Lion: standardized logit distillation with a supervised contrastive term",
    settings=Settings,
    presets={
        "default": Preset(
            "one stage on the whole student: cross-entropy, standardized logits, contrast, all with Lion",
            {"optimizer": "lion", "lr": 1e-3, "weight_decay": 0.1, "schedule": "cosine"},
        ),
        "notebook": Preset(
            "the ConKD-Lion notebooks: Imagenette at 224 px, 300 + 50 epochs, published test accuracy 92.46 %; their quirks on. Their "
            "teacher starts from ImageNet weights: pass --teacher-pretrained or --teacher FILE, else it starts from random weights",
            {**_NOTEBOOK, "procedure": "notebook", "kd_weight": 1.0, "cosine_from_one": True, "keep_last_classifier": True},
        ),
        "readme": Preset(
            "the ConKD-Lion README: standardized KL at T = 2 plus 0.15 SupContrastive on one model, no cross-entropy",
            {**_NOTEBOOK, "procedure": "readme", "kd_weight": 1.0, "ce_weight": 0.0},
        ),
    },
    distil=distil,
    teacher=train_teacher,
    save_teacher=save_teacher,
    load_teacher=load_teacher,
)

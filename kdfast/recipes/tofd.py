"""TOFD, task-oriented feature distillation (Zhang, Shi, Shi, Ma, Bao, NeurIPS 2020).

Use it when you can afford classifiers on every stage of both networks: features then carry information about the classes before they
are compared.

A stage's classifier is a separable convolution of stride 2 for each stage that follows it, then average pool and one linear layer; the
last stage's classifier is the network's own. The teacher's are trained first, on its frozen maps. Then, with f the pooled features that
a classifier reads and z its logits,

    loss = sum over stages j of [feature_weight |W_j f_sj - f_tj| + CE(z_sj, y) + soft CE(z_sj, z_tj; T_e)]
           + orthogonal_weight sum over j of [|W_j W_j' - I| + |W_j' W_j - I|]

|.| is the norm of the whole matrix, not squared, not averaged; W_j has no bias; T_e = 1 + 3/250 (epoch + 1), and soft CE has no factor T^2.
The first norm grows with the batch, as in the authors' code; each of several processes takes the norm of its own share.

Presets: tofd (the authors' CIFAR-100 training), dih (Asadian, Salehi-Abari 2021).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdfast.data import Batch
from kdfast.engine.ranges import Checked, NotNegative, Temperature, UpToOne
from kdfast.engine.stage import Mean, Outputs, Terms
from kdfast.losses import TOFDLoss
from kdfast.models import Taps, separable_head, tap_shapes
from kdfast.recipes import supervised
from kdfast.recipes.features import FeatureMaps, check_as_many, head_input, move_channels
from kdfast.recipes.recipe import Extended, Preset, Recipe, Setup, Stages, Trained, cross_entropy
from kdfast.recipes.trainings import DIH_README, TOFD


@dataclass(frozen=True)
class Settings(Checked):
    """Hyper-parameters of task-oriented feature distillation."""

    feature_weight: NotNegative = 0.05
    """Weight of the features' distance."""
    orthogonal_weight: NotNegative = 0.03
    """Weight of the term that keeps the maps between features orthogonal."""
    temperature: Temperature = 1.0
    """T of the first epoch, before the growth."""
    temperature_growth: NotNegative = 3 / 250
    """Growth of T in each epoch, the first included."""
    label_smoothing: UpToOne = 0.0
    """Label smoothing of the cross-entropies."""
    student_stages: tuple[str, ...] = ()
    """Modules of the student that get a classifier, and at last its own; none: the ends of its stages."""
    teacher_stages: tuple[str, ...] = ()
    """Modules of the teacher, as many; none: the ends of its stages."""


class StageClassifiers(Extended):
    """A network with a classifier on each stage.

    Args:
        model: images -> logits.
        named, option, image_size: as FeatureMaps.
        classes: outputs of the classifiers.

    Attributes:
        paths: the modules whose outputs the classifiers read.
        heads: the classifiers of all stages but the last, which is the network's own.
        sizes: number of features that each classifier reads, the network's own last.
    """

    def __init__(self, model: nn.Module, named: tuple[str, ...], option: str, image_size: int, classes: int) -> None:
        super().__init__(model)
        maps, last = FeatureMaps(model, named, option, image_size), head_input(model)[0]
        channels = [shape[0] for shape in maps.shapes]
        self.paths = maps.paths
        self.heads = nn.ModuleList(separable_head(channels[j:], classes) for j in range(len(channels) - 1))
        (read,) = tap_shapes(model, (last,), (3, image_size, image_size))
        self.sizes = (*(channels[-1] for _ in self.heads), math.prod(read))
        self._tapped, self._channels_last = Taps(model, (*maps.full, last)), maps.channels_last

    def predict(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Images [B, 3, H, W] -> features [B, D_j] and logits [B, C] of every classifier, the network's own last."""
        logits, (*maps, last) = self._tapped(images)
        pairs = [head(F) for head, F in zip(self.heads, move_channels(maps, self._channels_last))]
        return [*(f for f, _ in pairs), last.flatten(1)], [*(z for _, z in pairs), logits]


def train_heads(setup: Setup, settings: Settings, given: Trained | None) -> Stages[Trained]:
    """Takes or trains the teacher, then trains its classifiers on the sum of their cross-entropies."""
    model, spec = yield from supervised.teacher(setup, settings, given)
    teacher = StageClassifiers(model, settings.teacher_stages, "teacher_stages", setup.data.image_size, setup.classes)
    if names := teacher.paths[:-1]:
        yield from supervised.train_heads(setup, model, teacher.heads, lambda images: teacher.predict(images)[1], names)
    return Trained(teacher, spec)


def distil(setup: Setup, settings: Settings, teacher: StageClassifiers) -> Stages[Trained]:
    """One stage: the student, its classifiers and the maps between features."""
    student = StageClassifiers(setup.student(), settings.student_stages, "student_stages", setup.data.image_size, setup.classes)
    check_as_many(student.paths, teacher.paths)
    weights = {"feature_weight": settings.feature_weight, "orthogonal_weight": settings.orthogonal_weight}
    task_oriented = TOFDLoss(student.sizes, teacher.sizes, **weights)
    data, last = setup.loaders(setup.training), len(student.sizes) - 1

    def forward(batch: Batch) -> Outputs:
        with torch.no_grad():
            teacher_features, teacher_logits = teacher.predict(batch.images)
        features, logits = student.predict(batch.images)
        outputs = {"logits": logits[last]} | {f"logits/{j}": z for j, z in enumerate(logits[:last])}
        outputs |= {f"features {j}": W(f) for j, (W, f) in enumerate(zip(task_oriented.maps, features))}
        outputs |= {f"teacher {j}": z for j, z in enumerate(teacher_logits)}
        return outputs | {f"target {j}": f for j, f in enumerate(teacher_features)}

    def loss(outputs: Outputs, batch: Batch) -> Terms:
        features, targets, teacher_logits = ([outputs[f"{n} {j}"] for j in range(last + 1)] for n in ("features", "target", "teacher"))
        logits = [*(outputs[f"logits/{j}"] for j in range(last)), outputs["logits"]]
        T = settings.temperature + settings.temperature_growth * (data.train.state_dict()["epoch"] + 1)
        smoothing, hidden = settings.label_smoothing, setup.labels_hidden
        ce = [cross_entropy(z, batch.labels, label_smoothing=smoothing, hidden=hidden) for z in logits]
        terms = task_oriented.terms(features, targets, logits, teacher_logits, temperature=T)
        return {"ce": Mean(torch.stack([one.value for one in ce]).sum(), ce[0].rows)} | terms

    trained = (student.model, student.heads, task_oriented)
    yield setup.stage("distil", train=trained, frozen=(teacher,), forward=forward, loss=loss, data=data, couples_rows=True)
    return Trained(student.model, setup.student_spec)


RECIPE = Recipe(
    name="tofd",
    title="Task-oriented feature distillation (Zhang et al. 2020): classifiers on every stage, their features and logits",
    settings=Settings,
    presets={
        "default": Preset("feature 0.05, orthogonal 0.03, trained as suits the data set"),
        "tofd": Preset("the authors' CIFAR-100 training: batch 128, 250 epochs, x 0.1 at 80/160/240, Cutout of 16 pixels", TOFD),
        "dih": Preset(
            "Distilling Knowledge via Intermediate Classifiers' comparison: 200 epochs, x 0.2 at 60/120/180",
            {**DIH_README, "batch_size": 128, "gamma": 0.2},
        ),
    },
    distil=distil,
    teacher=train_heads,
)

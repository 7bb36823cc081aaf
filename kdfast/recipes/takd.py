"""TAKD, teacher assistants (Mirzadeh et al., AAAI 2020, arXiv:1902.03393).

Use it when the teacher is many times larger than the student. Each assistant costs one more training.

The teacher distils an assistant of a size between the two, that assistant distils the next one, and the last one distils the student.
Every hop is plain distillation (kd.py) with the same settings and the same training.

Presets: takd (the authors' CIFAR-100 example), dih (Asadian, Salehi-Abari 2021).
"""

import functools
import math
import re
from dataclasses import dataclass, replace

from torch import nn

from kdfast.engine.random_state import derive
from kdfast.models import ModelSpec, create, names, parameter_count
from kdfast.models.zoo import outline
from kdfast.recipes import kd
from kdfast.recipes.recipe import Preset, Recipe, Setup, Stages, Trained, seeded
from kdfast.recipes.trainings import DIH_README, TAKD


@dataclass(frozen=True)
class Settings(kd.Settings):
    """Hyper-parameters of teacher assistants."""

    assistants: tuple[str, ...] = ()
    """Architectures from teacher to student; none: one of the student's family, midway between the two in parameters."""


def distil(setup: Setup, settings: Settings, teacher: nn.Module) -> Stages[Trained]:
    """One stage for each hop."""
    chain = settings.assistants or (midway(setup.student_spec, parameter_count(teacher)),)
    setup.say(f"  chain: {' -> '.join([setup.teacher_spec.name, *chain, setup.student_spec.name])}")
    for number, name in enumerate(chain, start=1):
        spec = ModelSpec(name, setup.classes)
        with seeded(derive(setup.seed, f"assistant{number}")):
            assistant = create(name, setup.classes)
        teacher, _ = yield from kd.follow(f"assistant{number}", setup, settings, assistant, spec, teacher)
    return (yield from kd.follow("distil", setup, settings, setup.student(), setup.student_spec, teacher))


def midway(student: ModelSpec, teacher_size: int) -> str:
    """Returns the network of the student's family nearest to the middle of student and teacher, by log of parameters.

    A family is all networks whose names differ in numbers only.

    Raises:
        ValueError: the family has none between the student and a teacher of `teacher_size` parameters.
    """
    own, family = _size(student), re.sub(r"\d+", "#", student.name)
    sizes = {name: _size(replace(student, name=name)) for name in names() if re.sub(r"\d+", "#", name) == family}
    middle = (math.log(own) + math.log(teacher_size)) / 2
    distances = {name: abs(math.log(n) - middle) for name, n in sizes.items() if own < n < teacher_size}
    if not distances:
        raise ValueError(
            f"assistants must be named: there is none of {student.name}'s family between {own:,} and {teacher_size:,} parameters"
        )
    return min(distances, key=lambda name: distances[name])


@functools.cache
def _size(spec: ModelSpec) -> int:
    return parameter_count(outline(spec))


RECIPE = Recipe(
    name="takd",
    title="Teacher assistants (Mirzadeh et al. 2020): distillation in hops of moderate size",
    settings=Settings,
    presets={
        "default": Preset("one assistant midway in size, every hop T = 4, 0.1 CE + 0.9 T^2 KL, trained as suits the data set"),
        "takd": Preset(
            "the authors' CIFAR-100 example, ResNet-110 to 20 to 8, 160 epochs; they search T and weight for every pair, here 5 and 0.5. "
            "Their code divides the KL by the number of classes as well, and begins at a tenth of its lr: neither is followed",
            {**TAKD, "temperature": 5.0, "kd_weight": 0.5, "ce_weight": 0.5},
        ),
        "dih": Preset(
            "Distilling Knowledge via Intermediate Classifiers' comparison: every hop its KD (its README's values)",
            {**DIH_README, "assistants": ("resnet20",), "temperature": 5.0, "kd_weight": 0.1, "ce_weight": 0.9},
        ),
    },
    distil=distil,
)

"""Terms that any recipe may have beside its own: --plus kd:weight=0.9 --plus lskd:weight=9,temperature=2 --plus supcon:weight=0.15

    kd        weight T^2 KL(softmax(t / T) || softmax(s / T))
    lskd      the same of standardized logits
    supcon    weight SupCon(projection(features), y), features what the student's classifier reads; an image whose label is hidden is
              contrasted under the teacher's most likely class

They are added to the stage that distils the student, the last that gives logits: earlier ones (heads, hints) stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from kdfast.data import HIDDEN, Batch
from kdfast.engine import Stage
from kdfast.engine.stage import Outputs, Terms
from kdfast.functional import kd_loss, supcon_loss
from kdfast.models import Taps, projection_head
from kdfast.recipes.features import head_input
from kdfast.recipes.recipe import Stages, Trained, alone_where_hidden, contrasted_processes, each

DEFAULTS = {
    "kd": {"weight": 0.9, "temperature": 4.0},
    "lskd": {"weight": 9.0, "temperature": 2.0},
    "supcon": {"weight": 0.15, "temperature": 0.07},
}
STAGE = "distil"
"""What recipes call the stage that distils the student."""


@dataclass(frozen=True)
class Term:
    """One added term."""

    name: str
    weight: float
    temperature: float

    @staticmethod
    def parse(text: str) -> "Term":
        """Reads "lskd" or "lskd:weight=9,temperature=2".

        Raises:
            ValueError: another term or option, or a value that is not positive.
        """
        name, _, rest = text.partition(":")
        if name not in DEFAULTS:
            raise ValueError(f"plus must begin with {', '.join(DEFAULTS)}, got {text!r}")
        values = dict(DEFAULTS[name])
        for option in filter(None, rest.split(",")):
            key, equals, value = option.partition("=")
            if key not in values or not equals:
                raise ValueError(f"plus {name} takes weight=NUMBER and temperature=NUMBER, got {option!r}")
            try:
                values[key] = float(value)
            except ValueError:
                raise ValueError(f"plus {name}: {key} must be a number, got {value!r}") from None
            if not values[key] > 0:
                raise ValueError(f"plus {name}: {key} must be positive, got {value}")
        return Term(name, **values)


def plus(stages: Stages[Trained], terms: Sequence[Term], teacher: nn.Module | None, *, labels_hidden: bool) -> Stages[Trained]:
    """The same stages, the terms added to the one that distils the student.

    Args:
        stages: the recipe's.
        terms: what is added.
        teacher: who says the class of an image whose label is hidden, and whom kd and lskd follow; None: the recipe has none. Where the
            recipe's student has another teacher in that stage (takd: the last assistant), that one is followed.
        labels_hidden: whether some labels are.

    Raises:
        ValueError: a term follows a teacher, and there is none; or the recipe's student gives no logits there (conkd's notebook).
    """
    if teacher is None and any(term.name != "supcon" for term in terms):
        raise ValueError("plus kd and lskd need a teacher, and this recipe has none")
    asked = labels_hidden or any(term.name != "supcon" for term in terms)
    return (yield from each(stages, lambda stage: _extended(stage, terms, teacher if asked else None) if stage.name == STAGE else stage))


def _extended(stage: Stage, terms: Sequence[Term], teacher: nn.Module | None) -> Stage:
    student, contrast = stage.train[0], any(term.name == "supcon" for term in terms)
    tapped = projection = None
    if contrast:
        tap, size = head_input(student)
        tapped, projection = Taps(student, (tap,)), projection_head(size)

    def forward(batch: Batch) -> Outputs:
        if tapped is None or projection is None:
            outputs = dict(stage.forward(batch))
        else:
            seen, (features,) = tapped.during(lambda: stage.forward(batch))
            outputs = {**seen, "plus embedding": projection(features.flatten(1))}
        if "logits" not in outputs:
            raise ValueError("plus: this recipe's student learns no logits in the stage that distils it")
        if teacher is not None:
            with torch.no_grad():  # most recipes have asked it already
                outputs["plus teacher"] = outputs["teacher"] if "teacher" in outputs else teacher(batch.images)
        return outputs

    def loss(outputs: Outputs, batch: Batch) -> Terms:
        added = {f"plus {term.name}": term.weight * _loss(term, outputs, batch) for term in terms}
        return {**stage.loss(outputs, batch), **added}

    return replace(
        stage,
        train=(*stage.train, *([projection] if projection is not None else [])),
        frozen=(*stage.frozen, *([teacher] if teacher is not None and teacher not in stage.frozen else [])),
        forward=forward,
        loss=loss,
        couples_rows=stage.couples_rows or contrast,
    )


def _loss(term: Term, outputs: Outputs, batch: Batch) -> torch.Tensor:
    if term.name != "supcon":
        return kd_loss(outputs["logits"], outputs["plus teacher"], temperature=term.temperature, standardize=term.name == "lskd")
    labels = batch.labels
    if "plus teacher" in outputs:
        labels = torch.where(labels == HIDDEN, outputs["plus teacher"].argmax(dim=1), labels)
    else:
        labels = alone_where_hidden(labels, batch.index)
    return supcon_loss(outputs["plus embedding"], labels, temperature=term.temperature, group=contrasted_processes())

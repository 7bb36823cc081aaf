"""Terms that any recipe may add to its own: --plus kd:weight=0.9 --plus lskd:weight=9,temperature=2 --plus supcon:weight=0.15

    kd        weight T^2 KL(softmax(t / T) || softmax(s / T))
    lskd      the same, of standardized logits
    supcon    weight SupCon(projection(features), y); features are the input of the student's classifier. An image with a hidden label
              takes the teacher's most likely class

They are added to the stage that distils the student, the last stage with logits; earlier stages (heads, hints) stay unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from kdfast.data import HIDDEN, Batch
from kdfast.engine import Stage
from kdfast.engine.ranges import Checked, Positive, Temperature
from kdfast.engine.stage import Outputs, Terms
from kdfast.functional import kd_loss, supcon_loss
from kdfast.models import Taps, projection_head
from kdfast.recipes.features import head_input
from kdfast.recipes.recipe import Stages, Trained, contrast_group, map_stages, separate_hidden

DEFAULTS = {
    "kd": {"weight": 0.9, "temperature": 4.0},
    "lskd": {"weight": 9.0, "temperature": 2.0},
    "supcon": {"weight": 0.15, "temperature": 0.07},
}
STAGE = "distil"  # recipes' name for the stage that distils the student


@dataclass(frozen=True)
class Term(Checked):
    """One added term."""

    name: str
    weight: Positive
    temperature: Temperature

    @staticmethod
    def parse(text: str) -> "Term":
        """Reads "lskd" or "lskd:weight=9,temperature=2".

        Raises:
            ValueError: another term or option, or a value that is not positive.
        """
        name, colon, rest = text.partition(":")
        if name not in DEFAULTS:
            raise ValueError(f"plus must begin with {', '.join(DEFAULTS)}, got {text!r}")
        values = dict(DEFAULTS[name])
        for option in rest.split(",") if colon else ():
            key, _, value = option.partition("=")
            try:
                good = key in values and float(value) > 0
            except ValueError:
                good = False
            if not good:
                raise ValueError(f"plus {name} takes weight=NUMBER and temperature=NUMBER, both positive, got {option!r}")
            values[key] = float(value)
        try:
            return Term(name, **values)
        except ValueError as error:
            raise ValueError(f"plus {name}: {error}") from None


def plus(stages: Stages[Trained], terms: Sequence[Term], teacher: nn.Module | None, *, labels_hidden: bool) -> Stages[Trained]:
    """Yields the same stages, with the terms added to the stage that distils the student.

    Args:
        stages: the recipe's.
        terms: the added terms.
        teacher: kd and lskd follow it, and it gives the classes of images with hidden labels; None: the recipe has no teacher. If the
            recipe's student has another teacher in that stage (takd: the last assistant), the terms follow that one.
        labels_hidden: some labels are hidden.

    Raises:
        ValueError: a term needs a teacher and there is none, or the recipe's student has no logits in that stage (conkd's notebook).
    """
    needed = any(term.name != "supcon" for term in terms)
    if teacher is None and needed:
        raise ValueError("plus kd and lskd need a teacher, and this recipe has none")
    asked = teacher if labels_hidden or needed else None
    return (yield from map_stages(stages, lambda stage: _extend(stage, terms, asked) if stage.name == STAGE else stage))


def _extend(stage: Stage, terms: Sequence[Term], teacher: nn.Module | None) -> Stage:
    contrast = any(term.name == "supcon" for term in terms)
    train, frozen = list(stage.train), list(stage.frozen)
    if contrast:
        tap, size = head_input(train[0])
        tapped, projection = Taps(train[0], (tap,)), projection_head(size)
        train.append(projection)
    if teacher is not None and teacher not in frozen:
        frozen.append(teacher)

    def forward(batch: Batch) -> Outputs:
        if contrast:
            outputs, (features,) = tapped.during(lambda: dict(stage.forward(batch)))
            outputs["plus embedding"] = projection(features.flatten(1))
        else:
            outputs = dict(stage.forward(batch))
        if "logits" not in outputs:
            raise ValueError("plus: this recipe's student learns no logits in the stage that distils it")
        if teacher is not None:
            with torch.no_grad():  # most recipes have asked it already
                outputs["plus teacher"] = outputs["teacher"] if "teacher" in outputs else teacher(batch.images)
        return outputs

    def loss(outputs: Outputs, batch: Batch) -> Terms:
        added = {f"plus {term.name}": term.weight * _loss(term, outputs, batch) for term in terms}
        return {**stage.loss(outputs, batch), **added}

    couples_rows = stage.couples_rows or contrast
    return replace(stage, train=train, frozen=frozen, forward=forward, loss=loss, couples_rows=couples_rows)


def _loss(term: Term, outputs: Outputs, batch: Batch) -> torch.Tensor:
    if term.name != "supcon":
        return kd_loss(outputs["logits"], outputs["plus teacher"], temperature=term.temperature, standardize=term.name == "lskd")
    labels = batch.labels
    if "plus teacher" in outputs:
        labels = torch.where(labels == HIDDEN, outputs["plus teacher"].argmax(dim=1), labels)
    else:
        labels = separate_hidden(labels, batch.index)
    return supcon_loss(outputs["plus embedding"], labels, temperature=term.temperature, group=contrast_group())

"""Arguments of another type, size or range: one sentence that names the argument, whichever public function was called."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from kdfast import data, engine, losses, models, recipes
from kdfast.data import make_loaders
from kdfast.functional import crd_loss, hint_loss, kd_loss, linear_kd_loss, soft_cross_entropy, supcon_loss
from kdfast.optim import Lion
from tests.engine.small import noise

X = torch.zeros(4, 3)
MAPS = torch.zeros(2, 3, 4, 4)
BANKS = torch.zeros(5, 3), torch.zeros(5, 3)
HALF = (0.5, 0.5, 0.5)


def case(function: Any, name: str, *arguments: Any, **options: Any) -> Any:
    return pytest.param(
        function, name, arguments, options, id=f"{function.__name__}: {name} {[*options.values()][-1:] or arguments[-1:]}"[:60]
    )


CASES = [
    case(kd_loss, "ignore_index", X, X, ignore_index=2.5),
    case(kd_loss, "standardize", X, X, standardize="yes"),
    case(kd_loss, "student", X.to_sparse(), X),
    case(linear_kd_loss, "student_bias", X, X, X, X, student_bias="x"),
    case(supcon_loss, "normalize", X, normalize="yes"),
    case(Lion, "max_grad_norm", [nn.Parameter(X)], max_grad_norm="x"),
    case(Lion, "fused", [nn.Parameter(X)], fused="yes"),
    case(losses.HintLoss((3, 4, 4), (5, 4, 4)).forward, "student", MAPS[:, :2], MAPS),
    *(case(kd_loss, "kd_weight", X, X, kd_weight=value) for value in (math.nan, math.inf, "1", [1.0])),
    case(kd_loss, "ce_weight", X, X, torch.zeros(4, dtype=torch.long), ce_weight=math.nan),
    case(kd_loss, "teacher_weights", X, [X, X], teacher_weights=[1.0, math.nan]),
    case(kd_loss, "eps", X, X, standardize=True, eps=math.inf),
    case(soft_cross_entropy, "student", X.long(), X),
    case(soft_cross_entropy, "temperature", X, X, math.inf),
    case(soft_cross_entropy, "teacher", X, X.to("meta")),
    case(hint_loss, "student", MAPS.long(), MAPS),
    case(hint_loss, "teacher", MAPS, MAPS.to("meta")),
    case(crd_loss, "teacher_bank", X[:2], X[:2], BANKS[0], BANKS[1][:4], torch.zeros(2, 2, dtype=torch.long)),
    case(losses.ConKDLoss, "alpha", alpha=-1.0),
    case(losses.TOFDLoss, "feature_weight", [4], [4], feature_weight=math.nan),
    *(case(losses.TOFDLoss, "student_features", sizes, [4]) for sizes in (None, [0], [2.5])),
    *(case(losses.SelfDistillationLoss, "student_channels", student_channels=size) for size in (0, -1, 2.5, None)),
    *(case(losses.CRDLoss, "feat_dim", 4, 4, 10, feat_dim=size) for size in (0, -1, 2.5)),
    case(losses.CRDLoss, "nce_m", 4, 4, 10, nce_m="x"),
    case(losses.HintLoss, "shapes", (0, 4, 4), (4, 4, 4)),
    *(case(models.classifier_head, "features", size, 3) for size in (0, -1, 2.5, None)),
    case(models.classifier_head, "dropout", 4, 3, dropout=math.nan),
    case(models.projection_head, "out", 4, 0),
    case(models.conv_head, "padding", 4, 3, padding=-1),
    case(models.flatten_head, "shape", (3, 8), 3),
    case(models.separable_head, "channels", [], 3),
    *(case(function, "model", None) for function in (models.find_head, models.feature_size, models.parameter_count)),
    case(models.replace_head, "module", nn.Linear(2, 2), None),
    case(models.Taps, "paths", nn.Linear(2, 2), "weight"),
    case(models.Taps, "model", None, ["0"]),
    case(models.tap_shapes, "image_shape", nn.Linear(2, 2), ["0"], (3, 8)),
    case(models.build, "spec", "resnet8"),
    case(models.ModelSpec, "name", None, 10),
    case(models.load_weights, "model", None, {}),
    case(models.read_weights, "path", 3),
    case(models.save_weights, "model_or_state", {"a": 1}, "w.safetensors"),
    case(recipes.get, "recipe", None),
    case(data.load, "name", 3),
    case(data.load, "seed", "digits", seed=2.5),
    case(data.load, "val_fraction", "digits", val_fraction="half"),
    case(data.hide_labels, "split", None, 0.5, seed=0),
    case(data.evaluation_transform, "mean", "squash", 8, (0.5,), HALF),
    case(data.evaluation_transform, "std", "squash", 8, HALF, (0.0, 0.0, 0.0)),
    case(data.evaluation_transform, "image_size", "squash", 2.5, HALF, HALF),
    *(case(make_loaders, "batch_size", noise(), batch_size=size) for size in ("x", 2.5, None)),
    case(make_loaders, "data", None, batch_size=2),
    case(make_loaders, "training transform", noise(), batch_size=2, train_transform=""),
    case(engine.join, "device", None),
    case(engine.Training, "epochs", epochs=2.5),
    case(engine.Training, "schedule", schedule="linear"),
    case(engine.Options, "precision", precision="int8"),
]


@pytest.mark.parametrize(("function", "name", "arguments", "options"), CASES)
def test_a_bad_argument_is_named_in_one_sentence(function, name, arguments, options):
    with pytest.raises((ValueError, TypeError)) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert name in message
    assert "\n" not in message
    assert not any(word in message for word in ("not supported between", "has no attribute", "empty()"))

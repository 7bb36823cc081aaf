"""Bad values of every option: each is refused before anything trains, in one sentence that names the option."""

import dataclasses
import importlib
import math
import pkgutil
import re
import time
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest

import kdfast
from kdfast import recipes
from kdfast.commands import config
from kdfast.commands.command_line import resolve
from kdfast.engine.ranges import Checked, Range
from tests.commands.running import KD, fail

LONG = 5.0  # seconds of work that a refusal may take


def list_options() -> list[type]:
    """Every dataclass of options: of commands, recipes, the engine and benchmarks."""
    for part in ("commands", "recipes", "engine", "benchmarks"):
        package = importlib.import_module(f"kdfast.{part}")
        for module in pkgutil.iter_modules(package.__path__):
            if not module.ispkg:
                importlib.import_module(f"kdfast.{part}.{module.name}")
    found, left = [], [Checked]
    while left:
        left += left.pop().__subclasses__()
        found += left[-1:]
    return sorted({kind for kind in (*found, *left) if kind.__module__.startswith(kdfast.__name__)}, key=str)


def find_number(hint: Any) -> tuple[type | None, Range | None]:
    """The number that a type holds, wherever it is, and its range."""
    if hint in (int, float):
        return hint, None
    inside = [find_number(part) for part in get_args(hint)] if get_origin(hint) is not Literal else []
    kind, limit = next((pair for pair in inside if pair[0]), (None, None))
    own = next((part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Range)), None)
    return kind, own or limit


@pytest.mark.parametrize("options", list_options(), ids=lambda kind: f"{kind.__module__.removeprefix('kdfast.')}.{kind.__name__}")
def test_every_number_of_every_option_has_a_range(options: type):
    hints = get_type_hints(options, include_extras=True)
    numbers = {field.name: find_number(hints[field.name]) for field in dataclasses.fields(options)}
    inherited = {"seeds", "label_fraction"}  # Absent: no options of the command
    assert not [name for name, (kind, limit) in numbers.items() if kind and limit is None and name not in inherited]


def bad_values(hint: Any) -> list[Any]:
    """Values that a field of this type must refuse."""
    kind, limit = find_number(hint)
    if get_origin(hint) is Annotated and kind is None:
        return bad_values(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return ["no such choice", "", 3]
    if kind:
        assert limit is not None
        outside = [value for value in (-1, 0, 2, 1e300) if not limit.holds(value) or not limit.least <= value <= limit.most]
        bad = [*outside, math.nan, math.inf, -math.inf, "3", True, *([2.5] if kind is int else [])]
        return [(value,) for value in bad] if "tuple" in str(hint) else bad
    return ["yes", 2] if hint is bool else []


@pytest.mark.parametrize("name", recipes.names())
def test_no_recipe_takes_a_bad_value(name: str):
    start = time.process_time()
    made = config.defaults(recipes.get(name), "default", "digits")
    tried = 0
    for part in ("method", "data", "training", "teacher_training", "run"):
        options = getattr(made, part)
        for field, hint in get_type_hints(type(options), include_extras=True).items():
            for value in bad_values(hint):
                tried += 1
                with pytest.raises((ValueError, TypeError), match=rf"^{field} must "):
                    dataclasses.replace(options, **{field: value})
    assert tried > 200
    assert time.process_time() - start < LONG


BAD = [
    ("kd", "--student nosuch", "there is no network 'nosuch'"),
    ("kd", "--teacher-model nosuch", "there is no network 'nosuch'"),
    ("kd", "--student-options depth=7", "'resnet8' does not take these options"),
    ("kd", "--teacher-options shortcut=Q", "shortcut"),
    ("kd", "--student vgg8_cifar --image-size 4", "student vgg8_cifar takes no images of 4 x 4 pixels"),
    ("kd", "--teacher-model alexnet", "teacher alexnet takes no images of 8 x 8 pixels"),
    ("kd", "--augment nosuch", "training transform must be one of"),
    ("kd", "--evaluation nosuch", "evaluation transform must be one of"),
    ("kd", "--loader nosuch", "invalid choice"),
    ("kd", "--plus kd:", "plus kd takes weight=NUMBER and temperature=NUMBER, both positive, got ''"),
    ("kd", "--plus kd:weight=inf", "plus kd: weight must be at most 1e+38, got inf"),
    ("kd", "--plus kd:temperature=1e-30", "plus kd: temperature must be at least 0.0001"),
    ("kd", "--temperature 1e-30", "temperature must be at least 0.0001, got 1e-30"),
    ("kd", "--image-size 1", "image_size must be at least 2, got 1"),
    ("kd", "--threads 100000", "threads must be at most 4096, got 100000"),
    ("kd", "--epochs 1.5", "--epochs must be a whole number, got '1.5'"),
    ("kd", "--lr fast", "--lr must be a number, got 'fast'"),
    ("kd", "--image-size x", "--image-size: no type matching {None}|INT could be instantiated from ['x'] (kdfast distill --help)"),
    ("kd", "--epoch 3", "Unrecognized options: --epoch, 3; did you mean"),
    ("kd", "--optimizer adam", "invalid choice 'adam' for argument '--optimizer'. Expected one of ('sgd', 'adamw', 'lion')"),
    ("kd", "--student=", "student must not be empty"),
    ("kd", "--augment=", "augment must not be empty"),
    ("kd", "--pretrained", "there are no pretrained weights for 'resnet8'"),
    ("at", "--student-stages nosuch", "student_stages: Taps: ResNet has no module 'nosuch'"),
    ("at", "--teacher-stages layer1 layer2", "equally many stages"),
    ("mhkd", "--teacher-stages layer1 linear", "teacher_stages: linear must put out a feature map"),
    ("mhkd", "--head-padding 0", "head_padding 0 needs maps of at least 5 x 5 pixels"),
    ("tofd", "--teacher-stages nosuch", "teacher_stages: Taps: ResNet has no module 'nosuch'"),
    ("dih", "--teacher-stages nosuch", "teacher_stages: Taps: ResNet has no module 'nosuch'"),
    ("dih", "--alpha 0.1 0.2", "alpha must be 1 value or 4, one for each of the teacher's classifiers, got 2"),
    ("dih", "--alpha 0", "alpha must be above 0 for at least one classifier"),
    ("dih", "--heads nowhere", "heads belong to one teacher"),
    ("fitnets", "--student-hint nosuch", "student_hint: Taps: ResNet has no module 'nosuch'"),
    ("fitnets", "--teacher-hint linear", "teacher_hint: linear must put out a feature map"),
    ("takd", "--assistants nosuch", "there is no network 'nosuch'"),
    ("self_distillation", "--shallow nosuch", "shallow and deep: Taps: ResNet has no module 'nosuch'"),
    ("self_distillation", "--plus kd", "plus kd and lskd need a teacher"),
    ("self_distillation", "--strict", "strict has no effect with recipe self_distillation, which has no teacher"),
    ("conkd", "--procedure notebook --plus lskd", "this recipe's student learns no logits"),
    ("conkd", "--classify-epochs 3", "classify_epochs has no effect with procedure joint"),
    ("fitnets", "--hint-weight 3", "hint_weight has no effect with procedure stages"),
    ("kd", "--optimizer sgd --nesterov --momentum 0", "nesterov needs a momentum above 0"),
    ("kd", "--optimizer adamw --momentum 0.8", "momentum has no effect with optimizer adamw"),
    ("kd", "--final-lr 0.5 --schedule steps", "final_lr has no effect with optimizer lion and schedule steps"),
    ("kd", "--micro-batch 128", "micro_batch has no effect with batch_size 64"),
    ("kd", "--teacher-training.milestones 3 5", "teacher_training.milestones has no effect"),
    ("kd", "--teacher weights.pt --teacher-pretrained", "teacher_pretrained has no effect with --teacher"),
    ("kd", "--teacher-normalization imagenet", "teacher_normalization has no effect without --teacher"),
    ("kd", "--data-dir .", "data_dir has no effect with dataset digits"),
    ("kd", "--early-stop 2 --val-fraction 0", "early_stop and schedule plateau need validation images"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "options", "message"), BAD, ids=[f"{recipe} {options}" for recipe, options, _ in BAD])
def test_what_cannot_work_is_refused_before_anything_trains(recipe, options, message, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    try:
        error = fail(capsys, "distill", *KD[2:], "--recipe", recipe, *options.split())
    except SystemExit:
        error = capsys.readouterr().err.strip()
    assert re.fullmatch("kdfast: .*", error), "one sentence"
    assert message in error
    assert time.process_time() - start < LONG
    assert not list(tmp_path.iterdir())


def test_an_option_of_several_recipes_is_for_those_that_use_it():
    for name in ("kd", "conkd"):  # conkd trains with Lion, which has no momentum
        assert resolve("compare", ["--recipe", name, "--dataset", "cifar10", "--momentum", "0.8"]).training.momentum == 0.8
